"""Spans that are left out of a text: source and targets make the text again."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmjax.core import Batch
from lmjax.data.corrupted import Corrupted, validation, vocab_size
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.text import Text
from lmjax.data.vocabulary import BPE, Bytes, Pretrained
from lmjax.errors import UserError

END, FIRST, L = 256, 266, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Corrupted:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("".join(f"number {i}, and then " for i in range(70)))
    text = Text(path=str(file), length=L, vocabulary=Bytes(), packing="stream", valid_fraction=0.2)
    return Corrupted(of=text, num_sentinels=10)


def joined(batch: Batch, row: int) -> list[int]:
    """The text of a row, its spans put back; what is padding is checked to be nothing."""
    sides = []
    for prefix, ids in (("source_", "source"), ("", "targets")):
        segments, positions = batch[f"{prefix}segments"][row], batch[f"{prefix}positions"][row]
        size = int(segments.sum())
        np.testing.assert_array_equal(segments, np.arange(len(segments)) < size)
        np.testing.assert_array_equal(positions, np.arange(len(segments)) * segments)
        held = batch[ids][row]
        assert not held[size:].any() and (size == 0 or held[size - 1] == END)
        sides.append(held[: max(size - 1, 0)].tolist())
    np.testing.assert_array_equal(batch["weights"][row], batch["segments"][row])
    source, targets = sides
    sentinel, spans = FIRST, dict[int, list[int]]()
    for token in targets:
        if token > END:
            assert token == sentinel - len(spans)
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    assert all(spans.values()) and [t for t in source if t > END] == list(spans)
    return [t for token in source for t in (spans[token] if token > END else [token])]


def test_the_text_comes_back(data: Corrupted) -> None:
    data.check()
    assert data.vocab_size == vocab_size(data) == 267
    assert {name: x.shape for name, x in data.example.items() if "seg" not in name} == {
        **dict.fromkeys(("source", "source_positions"), (L - 6 + 2 + 1,)),
        **dict.fromkeys(("targets", "positions", "weights"), (6 + 2 + 1,)),
    }
    plain = data.of.batches(batch_size=4, seed=3)
    batches = data.batches(batch_size=4, seed=3)
    found = list(itertools.islice(batches, 20))
    for batch, whole in zip(found, plain, strict=False):
        for row in range(4):
            assert joined(batch, row) == whole["tokens"][row].tolist()
    places = {tuple(np.flatnonzero(s > END)) for b in found for s in b["source"]}
    assert len(places) > 20
    part = data.batches(batch_size=4, seed=3, shard=1, num_shards=2, start=11)
    for name, value in next(part).items():
        np.testing.assert_array_equal(value, found[11][name][2:])


def test_an_epoch_of_what_is_held_out(data: Corrupted) -> None:
    """Each token once, the same spans every time; what is too short to corrupt is padding."""
    held_out = validation(data)
    found = list(held_out.epoch_batches(batch_size=4))
    text = [t for batch in found for row in range(4) for t in joined(batch, row)]
    plain = [
        token
        for batch in held_out.of.epoch_batches(batch_size=4)
        for row in range(4)
        for token in batch["tokens"][row][batch["weights"][row] > 0].tolist()
    ]
    assert plain and text == plain
    parts = [held_out.epoch_batches(batch_size=4, shard=i, num_shards=2) for i in range(2)]
    for batch, *halves in zip(found, *parts, strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([half[name] for half in halves]))
    assert len({d.fingerprint for d in (data, held_out, replace(data, rate=0.2))}) == 3


def test_sentinels_that_a_tokenizer_has(data: Corrupted, tmp_path: Path) -> None:
    assert isinstance(data.of, Text)
    learned = BPE(vocab_size=300).learn(["some words " * 20], [])
    assert isinstance(learned, SubwordTokenizer)
    held = json.loads(learned.tokenizer_json)
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = [*(f"<extra_id_{i}>" for i in range(8, -1, -1)), "</s>"]
    first = len(held["model"]["vocab"])
    held["added_tokens"] = [
        {"id": first + i, "content": name, "special": True, **kinds} for i, name in enumerate(names)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(held))
    vocabulary = Pretrained(path=str(tmp_path / "tokenizer.json"), end="</s>")
    own = replace(data, of=replace(data.of, vocabulary=vocabulary))
    assert list(own.sentinels) == [first + 8 - i for i in range(9)]
    assert own.vocab_size == own.of.vocab_size == first + 10
    batch = next(own.batches(batch_size=2, seed=0))
    assert batch["targets"][0][0] == first + 8 and batch["source"][0][-1] == first + 9


def test_refused(data: Corrupted) -> None:
    with pytest.raises(UserError, match=r"num_sentinels is 1, and rows of 40 tokens have 2 spans"):
        replace(data, num_sentinels=1)
    with pytest.raises(UserError, match=r"rate is 1\.5"):
        replace(data, rate=1.5)
    assert isinstance(data.of, Text)
    with pytest.raises(UserError, match=r"length is 1: give at least 2"):
        replace(data, of=replace(data.of, length=1))
