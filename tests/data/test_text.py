"""Windows against a loop over tokens; batches against every way of reading them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmjax.config import build, call
from lmjax.core import Batch, Dataset
from lmjax.data import source
from lmjax.data.text import Text, validation, vocab_size
from lmjax.data.vocabulary import BPE, Bytes, Characters
from lmjax.errors import UserError


def take(batches: Iterable[Batch], count: int) -> list[Batch]:
    taken = list(itertools.islice(batches, count))
    getattr(batches, "close", lambda: None)()
    return taken


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def join(shards: list[list[Batch]]) -> list[Batch]:
    """Batches of all shards, shard by shard, as the global batches."""
    steps = zip(*shards, strict=True)
    return [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in steps]


@pytest.fixture(scope="module")
def data(folder: str) -> Text:
    return Text(path=folder, length=16, vocabulary=Bytes(), valid_fraction=0.3)


def expected_window(text: Text, start: int) -> dict[str, list[float]]:
    """One example by a loop over its tokens."""
    tokens = text._windows.tokens
    owners = np.repeat(np.arange(len(tokens.starts)), np.diff([*tokens.starts, len(tokens.ids)]))
    row: dict[str, list[float]] = {name: [] for name in text.example}
    segment, position = 1, 0
    for index in range(start, start + text.length):
        here, there = index < len(tokens.ids), index + 1 < len(tokens.ids)
        if index > start and here:
            same = owners[index] == owners[index - 1]
            segment, position = (segment, position + 1) if same else (segment + 1, 0)
        together = there and (text.packing == "stream" or owners[index] == owners[index + 1])
        target = int(tokens.ids[index + 1]) if there else 0
        row["tokens"].append(int(tokens.ids[index]) if here else 0)
        row["targets"].append(target)
        row["weights"].append(float(together))
        row["target_bytes"].append(float(together and target != 256))
        if text.packing == "documents":
            row["segments"].append(segment if there else 0)
            row["positions"].append(position if there else 0)
    return row


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_windows_equal_a_loop(data: Text, packing: str) -> None:
    text = replace(data, packing=packing)
    last = text._windows.num_tokens - 2
    for start in [*range(60), last, last - 5, last - 14, last - 15, last - 16]:
        example = text._windows.at(start)
        for name, expected in expected_window(text, start).items():
            np.testing.assert_array_equal(example[name], expected, err_msg=f"{name} at {start}")


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_examples_are_as_declared(data: Text, packing: str) -> None:
    text = replace(data, packing=packing)
    batch = take(text.batches(batch_size=4, seed=0), 1)[0]
    assert batch.keys() == text.example.keys()
    for name, leaf in text.example.items():
        assert batch[name].dtype == leaf.dtype and batch[name].shape == (4, *leaf.shape)
    checked: Dataset = text
    assert checked.epochs(3 * text.num_examples) == {text.path: 3}


@pytest.mark.parametrize("num_shards", [2, 8])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_shards_are_consecutive_rows(data: Text, split: str, num_shards: int) -> None:
    text = replace(data, split=split)
    whole = take(text.batches(batch_size=8, seed=3), 12)
    parts = [
        take(text.batches(batch_size=8, seed=3, shard=shard, num_shards=num_shards), 12)
        for shard in range(num_shards)
    ]
    assert_same(join(parts), whole)


def test_start_is_a_seek(data: Text) -> None:
    whole = take(data.batches(batch_size=4, seed=3), 60)  # several epochs
    for start in (0, 1, 29, 58):
        assert_same(take(data.batches(batch_size=4, seed=3, start=start), 2), whole[start:][:2])
    far = take(data.batches(batch_size=4, seed=3, start=10_000_000_000), 2)
    assert far[0]["tokens"].shape == (4, 16)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data: Text, workers: int) -> None:
    there = replace(data, workers=workers)
    options = {"batch_size": 4, "seed": 3, "start": 7, "shard": 1, "num_shards": 2}
    assert_same(take(there.batches(**options), 5), take(data.batches(**options), 5))


def test_epochs_shuffle_and_shift(data: Text) -> None:
    size = data.num_examples
    text = replace(data, packing="stream")
    assert text.num_examples == size
    epochs = take(text.batches(batch_size=size, seed=3), 2)
    other = take(text.batches(batch_size=size, seed=4), 1)
    ids = text._windows.tokens.ids
    offsets = []
    for batch in [*epochs, *other]:
        rows = batch["tokens"]
        found = [
            offset
            for offset in range(text.length)
            if sorted(map(bytes, ids[offset:][: size * 16].reshape(size, 16).astype(np.int32)))
            == sorted(map(bytes, rows))
        ]
        assert len(found) == 1  # each window of one grid, once
        offsets += found
        assert (rows != ids[found[0] :][: size * 16].reshape(size, 16)).any()
    assert len(set(offsets)) > 1


def test_validation_covers_every_target_once(data: Text) -> None:
    valid = validation(data)
    batches = take(valid.epoch_batches(batch_size=4), 10**6)
    tokens = valid._windows.tokens
    counted = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    inside = np.setdiff1d(np.arange(len(tokens.ids)), tokens.starts)
    np.testing.assert_array_equal(counted, tokens.ids[inside])
    assert sum(b["target_bytes"].sum() for b in batches) == len(inside) - len(tokens.starts)
    assert all(b["tokens"].shape == (4, 16) for b in batches)
    assert len(batches) == -(-valid.num_examples // 4)
    parts = [
        take(valid.epoch_batches(batch_size=4, shard=i, num_shards=4), 10**6) for i in range(4)
    ]
    assert_same(join(parts), batches)
    repeated = take(valid.batches(batch_size=valid.num_examples, seed=0), 2)
    assert_same(repeated[:1], repeated[1:])
    np.testing.assert_array_equal(repeated[0]["tokens"][:4], batches[0]["tokens"])


def test_one_document_in_a_stream_is_the_file(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    data = Text(path=str(tmp_path / "input.txt"), length=10, packing="stream")
    decode = data.tokenizer.decode
    assert decode(data._windows.tokens.ids) == text[:900]
    assert decode(validation(data)._windows.tokens.ids) == text[900:]
    assert (take(data.batches(batch_size=8, seed=0), 1)[0]["weights"] == 1).all()
    assert vocab_size(data) == 27


def test_tokenizer_and_corpus_are_read_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(path=folder, length=9, vocabulary=BPE(vocab_size=270), valid_fraction=0.31)
    text._windows, validation(text)._windows
    monkeypatch.setattr(source, "text_of_file", None)
    again = Text(path=folder, length=7, vocabulary=BPE(vocab_size=270), valid_fraction=0.31)
    assert again.tokenizer is text.tokenizer is validation(text).tokenizer
    assert again._windows.tokens is text._windows.tokens


def test_static_properties_read_nothing(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setattr(source, "text_of_file", None)
    text = Text(path=folder, valid_fraction=0.123, vocabulary=BPE(vocab_size=512))
    assert text.example["tokens"].shape == (256,)
    assert vocab_size(text) == 512
    assert validation(text).vocab_size == 512


def test_recorded_calls(folder: str) -> None:
    recorded = call(Text, path=folder, length=8, vocabulary=call(Characters), split_by="document")
    text, valid, size = build(
        (recorded, call(validation, of=recorded), call(vocab_size, of=recorded))
    )
    assert (text.split, valid.split) == ("train", "valid")
    assert size == text.tokenizer.vocab_size > 10
    with pytest.raises(UserError, match="packing"):
        call(Text, packing="document")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("length", 0, "length is 0"),
        ("workers", -1, "workers is -1"),
        ("valid_fraction", 1.0, r"valid_fraction is 1.0: give one in \[0, 1\)"),
        ("split", "test", "split is 'test'.*Allowed: train, valid"),
        ("packing", "steam", "Did you mean 'stream'"),
        ("path", "/nowhere/x.txt", "no text at '/nowhere/x.txt'"),
    ],
)
def test_bad_fields(data: Text, field: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(data, **{field: value})


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    data = Text(path=str(tmp_path / "a.txt"), length=30, packing="stream")
    assert take(data.batches(batch_size=2, seed=0), 1)
    with pytest.raises(
        UserError, match=r"valid split of .* holds 10 tokens, .* needs 31. Set length"
    ):
        validation(data).check()
    exact = replace(data, length=89)  # one window, and one place for it
    assert exact.num_examples == 1
    batch = take(exact.batches(batch_size=2, seed=5), 1)[0]
    np.testing.assert_array_equal(batch["tokens"][0], batch["tokens"][1])
    with pytest.raises(UserError, match=r"train split .* holds 90 tokens, .* needs 91"):
        replace(data, length=90).batches(batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 3}, "batch_size 4 does not divide among 3 shards"),
        ({"shard": 2, "num_shards": 2}, "shard 2 of 2"),
        ({"start": -1}, "start -1"),
    ],
)
def test_bad_shards(data: Text, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.batches(batch_size=4, seed=0, **options)
