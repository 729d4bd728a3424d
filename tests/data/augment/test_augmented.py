"""Augmented data sets: what changes, what does not, and that hosts and starts change nothing."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.config import build, call
from lmjax.core import Dataset, Spec
from lmjax.data.augment.augmented import Augmented
from lmjax.data.augment.image import Flip, RandomCrop
from lmjax.data.augment.text import TokenDropout
from lmjax.data.batches import Examples, OneByOne
from lmjax.data.packed import Tokens
from lmjax.data.text import Text
from lmjax.errors import UserError
from tests.data.stores import END, random_documents, write_store

MASK = 256
SIZES = [*np.random.default_rng(2).integers(1, 50, 40).tolist(), 90]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures by number, as an image data set has them."""

    fingerprint = "pictures"

    @property
    def example(self) -> Spec:
        return {
            "image": jax.ShapeDtypeStruct((6, 5, 3), np.float32),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }

    def check(self) -> None: ...

    def stacked(self, *, seed: int) -> Examples:
        return OneByOne(_picture)


def _picture(index: int) -> dict[str, np.ndarray]:
    image = np.random.default_rng(index % 20).random((6, 5, 3)).astype(np.float32)
    return {"image": image, "label": np.int32(index % 20)}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    path = tmp_path_factory.mktemp("corpus")
    write_store(path / "train", random_documents(SIZES), num_shards=2)
    return Tokens(path=str(path), length=32)


def take(data: Any, count: int, **options: Any) -> list[Any]:
    batches = data.batches(**{"batch_size": 4, "seed": 3} | options)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def test_only_inputs_change_and_by_example_alone(tokens: Tokens) -> None:
    dropout = TokenDropout(id=MASK, rate=0.3, keep=(0, END))
    data = pickle.loads(pickle.dumps(Augmented(data=tokens, arrays={"tokens": (dropout,)})))
    checked: Dataset = data
    checked.check()
    assert checked.example == tokens.example and checked.vocab_size == 257
    plain, found = take(tokens, 30), take(data, 30)
    replaced = total = 0
    for number, (before, after) in enumerate(zip(plain, found, strict=True)):
        for name in before:
            if name != "tokens":
                np.testing.assert_array_equal(before[name], after[name])
        for row in range(4):
            expected = dropout(before["tokens"][row], seed=3, index=4 * number + row)
            np.testing.assert_array_equal(after["tokens"][row], expected)
        open_ = ~np.isin(before["tokens"], (0, END))
        replaced += int((after["tokens"] != before["tokens"])[open_].sum())
        total += int(open_.sum())
        np.testing.assert_array_equal(after["tokens"][~open_], before["tokens"][~open_])
    assert 0.25 < replaced / total < 0.35
    for shard in range(2):
        part = take(data, 3, start=5, shard=shard, num_shards=2)
        for step in range(3):
            rows = found[5 + step]["tokens"][2 * shard : 2 * shard + 2]
            np.testing.assert_array_equal(part[step]["tokens"], rows)
    np.testing.assert_array_equal(data.examples(seed=3)[21]["tokens"], found[5]["tokens"][1])
    held = [next(d.epoch_batches(batch_size=4))["tokens"] for d in (data, tokens)]
    np.testing.assert_array_equal(*held)
    other = replace(data, seed=1)
    assert (take(other, 1)[0]["tokens"] != found[0]["tokens"]).any()
    prints = {d.fingerprint for d in (data, other, tokens, replace(data, arrays={}))}
    assert len(prints) == 4


def test_any_data_set_can_be_augmented() -> None:
    arrays = {"image": (RandomCrop(height=4, width=4, padding=1), Flip())}
    data = Augmented(data=Pictures(), arrays=arrays)
    assert data.example["image"].shape == (4, 4, 3)
    found = take(data, 12)
    for step, batch in enumerate(found):
        for row in range(4):
            image = _picture(4 * step + row)["image"]
            for augment in arrays["image"]:
                image = augment(image, seed=3, index=4 * step + row)
            np.testing.assert_array_equal(batch["image"][row], image)
            assert batch["label"][row] == (4 * step + row) % 20
    again = [found[step]["image"][0] for step in (0, 5, 10)]  # one picture in three epochs
    assert any((image != again[0]).any() for image in again[1:])


def test_recorded_and_refused(tokens: Tokens) -> None:
    recorded = call(
        Augmented,
        data=call(Tokens, path=tokens.path, length=32),
        arrays={"tokens": (call(TokenDropout, id=MASK),)},
    )
    assert build(recorded) == Augmented(data=tokens, arrays={"tokens": (TokenDropout(id=MASK),)})
    text = Augmented(data=Text(length=16), arrays={"tokens": (TokenDropout(id=0, rate=1.0),)})
    assert not text.examples(seed=0)[5]["tokens"].any()
    with pytest.raises(UserError, match=r"'token', which no example has\. Did you mean 'tokens'"):
        Augmented(data=tokens, arrays={"token": ()})
    with pytest.raises(UserError, match=r"rate is 1\.5"):
        TokenDropout(id=1, rate=1.5)
