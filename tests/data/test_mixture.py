"""A mixture gives each source its share, and its own examples in their own order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmjax.core import Dataset
from lmjax.data.mixture import Mixture
from lmjax.data.text import Text
from lmjax.data.vocabulary import Bytes, Characters
from lmjax.errors import UserError


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    sources = {}
    for letter, size in (("a", 4000), ("b", 900)):
        file = Path(folder) / f"{letter}.txt"
        file.write_text(letter * size)
        sources[letter] = Text(
            path=str(file), length=8, vocabulary=Bytes(), packing="stream", valid_fraction=0
        )
    return Mixture(sources=sources, weights={"a": 3, "b": 1})


def test_shares(mixture: Mixture) -> None:
    batches = mixture.batches(batch_size=40, seed=1)
    rows = np.concatenate([b["tokens"][:, 0] for b in itertools.islice(batches, 10)])
    batches.close()
    for count in range(1, len(rows)):
        assert abs((rows[:count] == ord("a")).sum() - 0.75 * count) <= 1
    checked: Dataset = mixture
    epochs = checked.epochs(448 * 4)
    assert epochs == pytest.approx({"a": 1344 / 499, "b": 448 / 111}, rel=0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_and_start(mixture: Mixture, workers: int) -> None:
    whole = list(itertools.islice(mixture.batches(batch_size=8, seed=1), 9))[6:]
    other = replace(mixture, workers=workers)
    parts = []
    for shard in range(2):
        batches = other.batches(batch_size=8, seed=1, shard=shard, num_shards=2, start=6)
        parts.append(list(itertools.islice(batches, 3)))
        batches.close()
    for step, expected in enumerate(whole):
        for name in expected:
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, expected[name])


def test_mixtures_nest(mixture: Mixture) -> None:
    outer = Mixture(
        sources={"inner": mixture, "b": mixture.sources["b"]}, weights={"inner": 1, "b": 1}
    )
    assert set(outer.epochs(100)) == {"inner/a", "inner/b", "b"}
    rows = next(outer.batches(batch_size=8, seed=0))["tokens"][:, 0]
    assert (rows == ord("b")).sum() == 5


def test_refusals(mixture: Mixture) -> None:
    first, second = mixture.sources["a"], mixture.sources["b"]
    assert isinstance(second, Text)

    def mix(**fields: object) -> Mixture:
        return replace(mixture, **fields)

    with pytest.raises(UserError, match="needs at least one source"):
        mix(sources={}, weights={})
    with pytest.raises(UserError, match="no weight 'b'"):
        mix(weights={"a": 1})
    with pytest.raises(UserError, match=r"no source 'c'.*Allowed: a, b"):
        mix(weights={"a": 1, "b": 1, "c": 1})
    with pytest.raises(UserError, match=r"every weight is 0 \(a, b\)"):
        mix(weights={"a": 0, "b": 0.0})
    for weight in (-1, float("nan"), float("inf"), 1e-300):
        with pytest.raises(UserError, match=f"weight of 'b' is {weight}"):
            mix(weights={"a": 1, "b": weight})
    with pytest.raises(UserError, match="workers is 100000"):
        mix(workers=100_000)
    with pytest.raises(UserError, match="leave_out names 'segment'"):
        mix(leave_out=("segment",))
    with pytest.raises(UserError, match=r"'b' and 'a' differ: .*\(9,\).* same length and packing"):
        mix(sources={"a": first, "b": replace(second, length=9)})
    mixed = mix(sources={"a": first, "b": replace(second, vocabulary=Characters())})
    with pytest.raises(UserError, match="different tokenizers"):
        mixed.batches(batch_size=2, seed=0)
