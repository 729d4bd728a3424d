"""Sources of a store in their shares, and stores in mixtures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.data.describe import describe
from lmjax.data.mixture import Mixture
from lmjax.data.packed import Tokens, validation
from lmjax.data.schedule import PERIOD, Schedule
from lmjax.errors import UserError
from tests.data.stores import (
    SIZES,
    VALID_SIZES,
    assert_same,
    random_documents,
    take,
    write_corpus,
    write_store,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_weights_draw_sources_in_proportion(path: Path) -> None:
    data = Tokens(path=str(path), length=32, weights={"a": 3, "b": 1})
    rows = np.diff(data._rows.first_rows)
    source, rank = data._plan[1].at(np.arange(5 * PERIOD))
    drawn = np.cumsum(source == 0)
    assert np.abs(drawn - 0.75 * np.arange(1, 5 * PERIOD + 1)).max() <= 1
    for s in range(2):
        np.testing.assert_array_equal(rank[source == s], np.arange((source == s).sum()))
    expected = {"a": 0.75 * 4000 / rows[0], "b": 1000 / rows[1]}
    assert data.epochs(4000) == pytest.approx(expected)
    only = replace(data, weights={"b": 1})
    found = {piece.document % 3 for i in range(40) for piece in only.origins(seed=1)[i].pieces}
    assert found == {1}


def test_weights_of_the_preparation_are_the_default(path: Path, tmp_path: Path) -> None:
    for weights, drawn in (
        ({"a": 3.0, "b": 1.0}, {"a": 3, "b": 1}),
        ({"a": 0.0, "b": 2.0, "gone": 1.0}, {"b": 1}),
        ({"a": None, "b": None}, {}),
    ):
        folder = tmp_path / str(drawn)
        written = {"sources": ("a", "b", "a"), "more": {"weights": weights}}
        write_store(folder / "train", random_documents(SIZES), **written)
        write_store(folder / "valid", random_documents([5, 40]), **written)
        told = Tokens(path=str(folder), length=32)
        given = replace(told, weights=drawn)
        left, right = (take(d.batches(batch_size=4, seed=1), 20) for d in (told, given))
        assert_same(left, right)
        assert told.epochs(400) == given.epochs(400)
        other = replace(told, weights={"a": 1, "b": 7})
        assert not drawn or other.fingerprint != told.fingerprint
        assert validation(told).epochs(validation(told).num_examples) == {str(folder): 1}
        if drawn:
            capped = replace(told, max_epochs={"b": 1.5})
            limit = round(1.5 * np.diff(told._rows.first_rows)[1])
            assert capped.epochs(10**6 if "a" in drawn else limit)["b"] == pytest.approx(
                limit / np.diff(told._rows.first_rows)[1]
            )


def test_epochs_of_a_source_are_capped(path: Path) -> None:
    data = Tokens(path=str(path), length=32, weights={"a": 1, "b": 1}, max_epochs={"b": 1.5})
    rows = np.diff(data._rows.first_rows).tolist()
    limit = round(1.5 * rows[1])
    source, rank = data._plan[1].at(np.arange(6 * limit))
    assert (source == 1).sum() == limit
    assert (source[2 * limit + 1 :] == 0).all() and (source[: 2 * limit] == 1).sum() >= limit - 1
    np.testing.assert_array_equal(rank[source == 0], np.arange((source == 0).sum()))
    assert data.epochs(6 * limit)["b"] == pytest.approx(limit / rows[1])
    ended = replace(data, max_epochs={"a": 1, "b": 1})
    total = sum(rows)
    assert ended.epochs(10**9) == {"a": 1, "b": 1}
    source, rank = ended._plan[1].at(np.arange(total))
    for s in range(2):
        np.testing.assert_array_equal(rank[source == s], np.arange(rows[s]))
    with pytest.raises(UserError, match=f"after {total} every source"):
        ended._plan[1].at(np.arange(total + 1))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_schedule_counts_as_it_draws(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=size, max_size=size))
    weights = data.draw(st.lists(st.floats(0.001, 50), min_size=size, max_size=size))
    caps = data.draw(st.lists(st.floats(0.2, 40), min_size=size, max_size=size))
    plan = Schedule(sizes, weights, caps)
    assert plan.total == sum(max(1, round(s * c)) for s, c in zip(sizes, caps, strict=True))
    source, rank = plan.at(np.arange(plan.total))
    for s in range(size):
        np.testing.assert_array_equal(rank[source == s], np.arange((source == s).sum()))
    for index in data.draw(st.lists(st.integers(0, plan.total), max_size=5)):
        np.testing.assert_array_equal(
            plan.given(index), np.bincount(source[:index], minlength=size)
        )


def test_mixed_across_stores_and_told_of(path: Path) -> None:
    data = Tokens(path=str(path), length=32)
    other = Tokens(path=str(path / "valid"), length=32, split="train")
    mixture = Mixture(sources={"many": data, "few": other}, weights={"many": 1, "few": 1})
    batch = take(mixture.batches(batch_size=4, seed=0), 1)[0]
    told = describe(mixture, 0, batch_size=4, seed=0)
    assert [row["source"].split("/")[0] for row in told["rows"]] == ["many", "few"] * 2
    for row in told["rows"]:
        held = random_documents(SIZES) if row["source"].startswith("many") else None
        held = held or random_documents(VALID_SIZES, seed=1)
        padded = np.zeros(32, bool)
        for first, end in row["padding"]:
            padded[first:end] = True
        np.testing.assert_array_equal(padded, batch["segments"][row["row"]] == 0)
        for piece in row["pieces"]:
            assert piece["name"] == f"doc{piece['document']}"
            np.testing.assert_array_equal(
                batch["tokens"][row["row"]][slice(*piece["columns"])],
                held[piece["document"]][slice(*piece["tokens"])],
            )


def test_mixtures_are_read_many_at_a_time(path: Path) -> None:
    data = Tokens(path=str(path), length=32)
    other = Tokens(path=str(path / "valid"), length=32)
    inner = Mixture(sources={"x": other, "y": data}, weights={"x": 1, "y": 3})
    mixture = Mixture(sources={"many": data, "few": inner}, weights={"many": 1, "few": 2})
    assert mixture.stacked(seed=5) is not None
    one_by_one = mixture.examples(seed=5)
    batches = take(mixture.batches(batch_size=6, seed=5, shard=1, num_shards=2, start=3), 4)
    for step, batch in enumerate(batches, start=3):
        for row in range(3):
            for name, value in one_by_one[6 * step + 3 + row].items():
                np.testing.assert_array_equal(batch[name][row], value)
