"""Packed rows against a loop over documents; batches against every way of reading them."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import build, call
from lmjax.core import Batch, Dataset
from lmjax.data.packed import Tokens, validation, vocab_size
from lmjax.data.packing import best_fit
from lmjax.errors import UserError
from tests.data.stores import (
    END,
    SIZES,
    VALID_SIZES,
    assert_same,
    random_documents,
    take,
    write_corpus,
    write_store,
)

PACKINGS = ("fit", "concatenate")


@pytest.fixture(scope="module", autouse=True)
def _unsynced() -> Iterator[None]:
    """Small stores by the hundred need not wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def join(shards: list[list[Batch]]) -> list[Batch]:
    steps = zip(*shards, strict=True)
    return [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in steps]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(params=PACKINGS)
def data(path: Path, request: pytest.FixtureRequest) -> Tokens:
    return Tokens(path=str(path), length=32, packing=request.param)


def loop_fit(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing one item at a time: how full the bins are, sorted."""
    spaces: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= size]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= size
        else:
            spaces.append(capacity - size)
    return sorted(spaces)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_best_fit_is_one_item_at_a_time(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 24))
    sizes = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bin_of, num_bins = best_fit(np.array(sizes, np.int64), capacity)
    used = np.bincount(bin_of, weights=sizes, minlength=num_bins)
    assert sorted((capacity - used).astype(int).tolist()) == loop_fit(sizes, capacity)


def check_rows(batches: list[Batch], documents: list[np.ndarray], packing: str) -> None:
    """Every token of every document once, next to its neighbours, by a loop over the rows."""
    length = batches[0]["tokens"].shape[1]
    pieces: list[tuple[int, ...]] = []
    predicted = 0
    for batch in batches:
        for tokens, targets, weights, segments, positions, counts in zip(
            *(batch[name] for name in ("tokens", "targets", "weights", "segments")),
            *(batch[name] for name in ("positions", "target_bytes")),
            strict=True,
        ):
            end = 0
            for segment in range(1, segments.max(initial=0) + 1):
                (columns,) = np.nonzero(segments == segment)
                first, end = columns[0], columns[-1] + 1
                assert (np.diff(columns) == 1).all()
                assert (positions[columns] == np.arange(len(columns))).all()
                inside = columns[:-1]
                assert (weights[inside] == 1).all()
                assert (targets[inside] == tokens[inside + 1]).all()
                piece = tokens[columns].tolist()
                if piece[-1] == END:
                    assert weights[end - 1] == 0
                else:  # cut: the next token is still predicted
                    assert end == length and weights[end - 1] == 1
                    piece.append(-1 - int(targets[end - 1]))
                if packing == "fit" and first > 0:
                    assert tokens[first - 1] == END
                pieces.append(tuple(piece))
            for array in (tokens, weights, segments, positions, counts):
                assert not array[end:].any()
            np.testing.assert_array_equal(counts, weights * (targets != END))
            predicted += int(weights.sum())
    assert predicted == sum(len(document) - 1 for document in documents)
    if packing == "fit":
        assert Counter(pieces) == Counter(
            (
                *document[cut : cut + length].tolist(),
                *(-1 - document[cut + length : cut + length + 1]).tolist(),
            )
            for document in documents
            for cut in range(0, len(document), length)
        )
    else:
        stream = [token for piece in pieces for token in piece if token >= 0]
        assert Counter(stream) == Counter(np.concatenate(documents).tolist())
        assert len(pieces) <= len(documents) + sum(len(b["tokens"]) for b in batches)


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    length=st.integers(1, 17),
    seed=st.integers(0, 5),
    num_shards=st.integers(1, 3),
)
def test_an_epoch_holds_every_token_once(
    packing: str, sizes: list[int], length: int, seed: int, num_shards: int
) -> None:
    documents = random_documents(sizes, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), documents, sources=("a", "b"), num_shards=num_shards)
        data = Tokens(path=folder, length=length, packing=packing)
        epoch = data.num_examples
        here = data._examples(seed)
        for number in range(2):
            batch = here.rows(range(number * epoch, (number + 1) * epoch))
            check_rows([batch], documents, packing)
        if packing == "concatenate":
            of_each = [sum(sizes[source::2]) for source in range(2)]
            assert epoch == sum(-(-size // length) for size in of_each)


def test_the_validation_split_comes_in_order(path: Path) -> None:
    valid = validation(Tokens(path=str(path), length=16, weights={"a": 1}))
    documents = random_documents(VALID_SIZES, seed=1)
    batches = take(valid.epoch_batches(batch_size=4), 10**6)
    assert len(batches) == -(-valid.num_examples // 4)
    check_rows(batches, documents, "fit")
    repeated = take(valid.batches(batch_size=valid.num_examples, seed=0), 2)
    assert_same(repeated[:1], repeated[1:])
    np.testing.assert_array_equal(repeated[0]["tokens"][:4], batches[0]["tokens"])
    parts = [
        take(valid.epoch_batches(batch_size=4, shard=i, num_shards=4), 10**6) for i in range(4)
    ]
    assert_same(join(parts), batches)
    first = batches[0]["tokens"][0]
    np.testing.assert_array_equal(first[:5], documents[0][:5])
    assert validation(replace(valid, split="train")) == valid


def test_concatenation_is_the_documents_in_order(path: Path) -> None:
    valid = Tokens(path=str(path), split="valid", length=16, packing="concatenate")
    batches = take(valid.epoch_batches(batch_size=3), 10**6)
    stream = np.concatenate(random_documents(VALID_SIZES, seed=1))
    got = np.concatenate([batch["tokens"].reshape(-1) for batch in batches])
    np.testing.assert_array_equal(got[: len(stream)], stream)
    check_rows(batches, random_documents(VALID_SIZES, seed=1), "concatenate")


def test_examples_are_as_declared(data: Tokens) -> None:
    batch = take(data.batches(batch_size=4, seed=0), 1)[0]
    assert batch.keys() == data.example.keys()
    for name, leaf in data.example.items():
        assert batch[name].dtype == leaf.dtype and batch[name].shape == (4, *leaf.shape)
    checked: Dataset = data
    assert checked.epochs(3 * data.num_examples) == {data.path: 3}
    assert vocab_size(data) == data.tokenizer.vocab_size == 257


@pytest.mark.parametrize("weights", [{}, {"a": 1.0, "b": 2.5}])
def test_hosts_starts_and_workers_change_nothing(data: Tokens, weights: dict[str, float]) -> None:
    data = replace(data, weights=weights, max_epochs={"b": 300} if weights else {})
    whole = take(data.batches(batch_size=8, seed=3), 40)  # several epochs
    for num_shards in (2, 8):
        parts = [
            take(data.batches(batch_size=8, seed=3, shard=shard, num_shards=num_shards), 12)
            for shard in range(num_shards)
        ]
        assert_same(join(parts), whole[:12])
    for start in (1, 29):
        assert_same(take(data.batches(batch_size=8, seed=3, start=start), 2), whole[start:][:2])
    one_by_one = data.examples(seed=3)
    for index in (0, 5, 100):
        for name, value in one_by_one[index].items():
            np.testing.assert_array_equal(value, whole[index // 8][name][index % 8])
    other = take(data.batches(batch_size=8, seed=4), 1)[0]
    assert (other["tokens"] != whole[0]["tokens"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(path: Path, workers: int) -> None:
    data = Tokens(path=str(path), length=32, weights={"a": 1, "b": 2})
    there = replace(data, workers=workers)
    options = {"batch_size": 4, "seed": 3, "start": 7, "shard": 1, "num_shards": 2}
    assert_same(take(there.batches(**options), 5), take(data.batches(**options), 5))


def test_a_far_start_is_a_seek(data: Tokens) -> None:
    far, epoch = 10_000_000, data.num_examples
    found = take(data.batches(batch_size=4, seed=3, start=far), 1)[0]
    rows = data._examples(3).rows(range(4 * far, 4 * far + 4))
    assert_same([found], [rows])
    begin = 4 * far // epoch * epoch
    whole = data._examples(3).rows(range(begin, begin + epoch))
    check_rows([whole], random_documents(SIZES), data.packing)


def test_a_store_in_pieces_is_the_same(path: Path, data: Tokens, tmp_path: Path) -> None:
    write_store(tmp_path / "train", random_documents(SIZES), sources=("a", "b", "a"), num_shards=11)
    other = replace(data, path=str(tmp_path))
    for weights in ({}, {"a": 1, "b": 1}):
        one, two = replace(data, weights=weights), replace(other, weights=weights)
        left, right = (take(d.batches(batch_size=4, seed=1), 9) for d in (one, two))
        assert_same(left, right)


def test_rows_are_packed_once_and_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(path / "many", random_documents(SIZES * 30))
    data = Tokens(path=str(path / "many"), length=256)
    assert data.store.num_tokens > 0.99 * data.num_examples * data.length
    assert list((path / "many").glob("rows-fit-256-*/begins.npy"))
    monkeypatch.setattr("lmjax.data.packing._write", None)
    assert_same(
        take(data.batches(batch_size=2, seed=0), 1),
        take(replace(data).batches(batch_size=2, seed=0), 1),
    )


def test_each_epoch_and_source_has_a_permutation_of_its_own(path: Path) -> None:
    documents = random_documents([8] * 40)
    write_store(path / "equal", documents, sources=("a", "b"))
    data = Tokens(path=str(path / "equal"), length=8, weights={"a": 1, "b": 1})
    drawn = data._examples(3)._rows_of(np.arange(160))
    a, b = (drawn[s::2].reshape(4, 20) for s in range(2))  # four epochs of twenty rows
    for orders, first in ((a, 0), (b, 20)):
        for order in orders:
            assert sorted(order.tolist()) == list(range(first, first + 20))
    orders = {tuple((order % 20).tolist()) for order in (*a, *b)}
    assert len(orders) == 8 and tuple(range(20)) not in orders


def test_a_store_that_is_made_anew_is_packed_anew(tmp_path: Path) -> None:
    for seed in range(2):
        documents = random_documents([9, 30, 4, 17 + seed], seed=seed)
        write_store(tmp_path, documents)
        data = Tokens(path=str(tmp_path), length=16)
        check_rows([data._examples(0).rows(range(data.num_examples))], documents, "fit")


def test_fingerprints_tell_batches_apart(path: Path, data: Tokens, tmp_path: Path) -> None:
    write_store(tmp_path / "train", random_documents(SIZES, seed=9), sources=("a", "b", "a"))
    others = [
        replace(data, length=31),
        replace(data, split="valid"),
        replace(data, packing=next(packing for packing in PACKINGS if packing != data.packing)),
        replace(data, weights={"a": 1}),
        replace(data, weights={"a": 1}, max_epochs={"a": 2}),
        replace(data, path=str(tmp_path)),
    ]
    found = {d.fingerprint for d in [data, replace(data), *others]}
    assert len(found) == 1 + len(others)


def test_recorded_calls(path: Path) -> None:
    recorded = call(Tokens, path=str(path), length=8, weights={"a": 1.0})
    data, valid, size = build(
        (recorded, call(validation, of=recorded), call(vocab_size, of=recorded))
    )
    assert (data.split, valid.split, size) == ("train", "valid", 257)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"split": "test"}, "Allowed: train, valid"),
        ({"packing": "fti"}, "Did you mean 'fit'"),
        ({"weights": {"a": 0.0}}, "weight of 'a' is 0.0"),
        ({"weights": {"a": 1}, "max_epochs": {"b": 1}}, "max_epochs names 'b'"),
        ({"max_epochs": {"b": 1}}, "give weights as well"),
        ({"path": "/nowhere"}, "no token store of the split 'train' at '/nowhere'"),
        ({"weights": {"c": 1}}, "no source 'c'.*Allowed: a, b"),
    ],
)
def test_bad_fields(path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(Tokens(path=str(path), length=32), **fields).check()
