"""Encoders against the reference; what a shard of records becomes; vocabularies from a sample."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

from lmjax.config import build, call
from lmjax.data.store import Store, seal_store
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import ByteTokenizer, CharacterTokenizer
from lmjax.data.vocabulary import BPE, Bytes, Pretrained
from lmjax.errors import UserError
from lmjax.prepare import encoders
from lmjax.prepare.encoders import Encoder
from lmjax.prepare.stage import RECORD
from lmjax.prepare.tokenise import Tokenise, Unigram
from tests.data.published import multilingual, npm_folder

WORDS = ["the", "café", "naïve", "漢字", "don't", "I'm", "2024", "12,345", "\n\n", "", "", "\t"]
WORDS += ["e\u0301", "🎭", "<|endoftext|>", "Ünïcode", "'ll", "z"]


class Spy(BPE):
    """Notes what it is to learn from."""

    @property
    def seen(self) -> list[list[str]]:
        return vars(self).setdefault("_seen", [])

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> ByteTokenizer:
        self.seen.append(list(train))
        return ByteTokenizer()


def rank(number: int) -> float:
    """Where in [0, 1) the hash of a record's id lies."""
    digest = hashlib.sha256(f"s/f#{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 60))) for _ in range(count)]


def table(held: Sequence[str], source: str = "s", first: int = 0) -> pa.Table:
    rows = [
        {"id": f"{source}/f#{first + i}", "text": text, "source": source, "meta": ""}
        for i, text in enumerate(held)
    ]
    return pa.Table.from_pylist(rows, schema=RECORD)


@pytest.fixture(scope="module")
def bpe() -> SubwordTokenizer:
    learned = BPE(vocab_size=400).learn(texts(200), [])
    assert isinstance(learned, SubwordTokenizer)
    return learned


def assert_encodes(tokenizer: SubwordTokenizer, engine: encoders.Engine, held: list[str]) -> None:
    """Without any check of its own, against the reference text by text."""
    found, name = Encoder(tokenizer, engine, checked_documents=0)(held)
    assert name == engine
    for text, ids in zip(held, found, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text), err_msg=repr(text[:80]))


def test_tiktoken_gives_the_same_ids(bpe: SubwordTokenizer) -> None:
    pytest.importorskip("tiktoken")
    assert_encodes(bpe, "tiktoken", [*texts(60, seed=5), "", " ", "\r\n" * 9, "a" * 3000])


def test_a_batch_is_what_each_text_is(bpe: SubwordTokenizer) -> None:
    held = [*texts(9, seed=2), ""]
    for ids, text in zip(bpe.encode_batch(held), held, strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))
    tree = json.loads(bpe.tokenizer_json)
    del tree["model"]["vocab"]["q"]
    lossy = SubwordTokenizer(tokenizer_json=json.dumps(tree), vocab_size=400, end_id=399)
    with pytest.raises(UserError, match="drops 1 bytes"):
        lossy.encode_batch(["a", "q"])


def test_a_pattern_of_its_own(bpe: SubwordTokenizer) -> None:
    """As Llama 3 and Qwen cut words: a pattern, then bytes; merges in an order that is not ids'."""
    pytest.importorskip("tiktoken")
    tree = json.loads(bpe.tokenizer_json)
    tree["normalizer"], words = {"type": "NFC"}, {"use_regex": False}
    tree["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": r"\p{N}{1,2}| ?\p{L}+|\s+(?!\S)|\s+|."},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True} | words,
        ],
    }
    vocab = tree["model"]["vocab"]
    tree["model"]["vocab"] = {token: 398 - index for token, index in vocab.items()}
    made = SubwordTokenizer(tokenizer_json=json.dumps(tree), vocab_size=400, end_id=399)
    assert_encodes(made, "tiktoken", texts(40, seed=6))


@pytest.mark.parametrize("engine", ["tiktoken", "gigatoken"])
def test_added_tokens(bpe: SubwordTokenizer, engine: encoders.Engine) -> None:
    """A special token in a text is text; one that is not special is itself, as Qwen 3's <think>."""
    pytest.importorskip(engine)
    tree = json.loads(bpe.tokenizer_json)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    size = len(tree["model"]["vocab"])
    tree["added_tokens"] = [
        {"id": size, "content": "<think>", "special": False} | flags,
        {"id": size + 1, "content": "<|endoftext|>", "special": True} | flags,
    ]
    made = SubwordTokenizer(tokenizer_json=json.dumps(tree), vocab_size=402, end_id=size + 1)
    held = [f"{text}<think>the" for text in texts(9)] + [*texts(9, seed=2), "a<|endoftext|>b"]
    assert size in made.encode(held[0]) and size + 1 not in made.encode(held[-1])
    assert_encodes(made, engine, held)


def test_what_tiktoken_cannot_spell_is_refused(
    bpe: SubwordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tiktoken")
    tree = json.loads(bpe.tokenizer_json)
    for changed, message in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not cut by one pattern"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is Lowercase"),
        ({"model": tree["model"] | {"type": "Unigram"}}, "not byte-level BPE"),
    ):
        other = SubwordTokenizer(
            tokenizer_json=json.dumps(tree | changed), vocab_size=400, end_id=399
        )
        with pytest.raises(UserError, match=message):
            Encoder(other, "tiktoken")(["a"])
    lower = json.dumps(tree | {"normalizer": {"type": "Lowercase"}})
    other = SubwordTokenizer(tokenizer_json=lower, vocab_size=400, end_id=399)
    monkeypatch.setattr(encoders, "_gigatoken", encoders._tiktoken)
    found, name = Encoder(other)(["Don't", "A"])
    assert name == "tokenizers" and found[1].tolist() == other.encode("a").tolist()


def test_an_engine_that_errs_encodes_nothing(
    bpe: SubwordTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reversed_(tokenizer: SubwordTokenizer) -> encoders.Encode:
        return lambda held: [tokenizer.encode(text)[::-1] for text in held]

    def loses_the_last(tokenizer: SubwordTokenizer) -> encoders.Encode:
        return lambda held: [*map(tokenizer.encode, held[:-1]), tokenizer.encode(held[-1])[:-1]]

    monkeypatch.setattr(encoders, "_gigatoken", reversed_)
    monkeypatch.setattr(encoders, "_tiktoken", loses_the_last)
    held = texts(8)
    found, name = Encoder(bpe, checked_documents=3)(held)
    assert name == "tokenizers"
    for ids, text in zip(found, held, strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))
    assert "gigatoken and tokenizers give different ids to document 0" in caplog.text
    assert "tiktoken and tokenizers give different ids to document 7" in caplog.text
    monkeypatch.setattr(
        encoders, "_tiktoken", lambda tokenizer: lambda held: bpe.encode_batch(held)
    )
    assert Encoder(bpe, checked_documents=3)(held)[1] == "tiktoken"


@pytest.mark.slow
def test_endless_words_fall_to_the_reference(bpe: SubwordTokenizer) -> None:
    """tiktoken's regular expressions overflow on a run of a million spaces."""
    pytest.importorskip("tiktoken")
    assert_encodes(bpe, "tiktoken", ["a" + " " * 1_200_000 + "b"])


@pytest.mark.parametrize("vocabulary", [Bytes(), BPE(vocab_size=300), Unigram(vocab_size=320)])
def test_records_become_a_store(vocabulary: BPE, tmp_path: Path) -> None:
    if isinstance(vocabulary, Unigram):
        pytest.importorskip("sentencepiece")
    stage = Tokenise(vocabulary=vocabulary)
    shards = [table(texts(20), "a"), table([*texts(9, seed=3), ""], "b")]
    tokenizer = stage.learn(shards)
    folder = tmp_path / "store"
    results = [
        stage.write(shard, tokenizer=tokenizer.to_json(), folder=folder, number=number)
        for number, shard in enumerate(shards)
    ]
    seal_store(folder, tokenizer=tokenizer)
    store, number = Store(str(folder)), 0
    assert store.tokenizer.hash == tokenizer.hash and store.sources == ("a", "b")
    for shard, result in zip(shards, results, strict=True):
        assert result.kept.equals(shard) and not len(result.quarantined)
        assert result.counts["documents"] == len(shard)
        assert result.counts["bytes of text"] == sum(
            len(text.encode()) for text in shard["text"].to_pylist()
        )
        for row in shard.to_pylist():
            name, source, first, end = store.document(number)
            assert (name, source) == (row["id"], row["source"])
            ids = store.read(first, end)
            assert ids[-1] == tokenizer.end_id and tokenizer.end_id not in ids[:-1]
            np.testing.assert_array_equal(ids[:-1], tokenizer.encode(row["text"]))
            assert tokenizer.decode(ids) == row["text"]
            number += 1
    assert number == store.num_documents
    assert sum(result.counts["tokens"] for result in results) == store.num_tokens
    held = {file.name: file.read_bytes() for file in folder.iterdir()}
    for shard in (1, 0):  # again, in another order
        stage.write(shards[shard], tokenizer=tokenizer, folder=folder, number=shard)
    assert held == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_cannot_be_spelled_is_quarantined(tmp_path: Path) -> None:
    records = table(["ab", "axb", "b"])
    result = Tokenise(vocabulary=Bytes()).write(
        records, tokenizer=CharacterTokenizer("ab"), folder=tmp_path, number=0
    )
    assert result.kept["id"].to_pylist() == ["s/f#0", "s/f#2"]
    (row,) = result.quarantined.to_pylist()
    assert row["id"] == "s/f#1" and "'x'" in row["reason"] and row["raw"] == "axb"
    assert result.counts["tokens"] == 5 and result.counts["documents"] == 2
    assert np.fromfile(tmp_path / "00000.bin", "<u2").tolist() == [0, 1, 2, 1, 2]


def test_a_sample_depends_on_ids_alone(tmp_path: Path) -> None:
    held = [f"word{i} " * 5 for i in range(200)]
    stage = Tokenise(vocabulary=BPE(vocab_size=300), sample_fraction=0.2, sample_bytes=10**6)
    whole = stage.learn([table(held)])
    parts = [table(held[i : i + 23], first=i) for i in range(0, 200, 23)]
    files = [tmp_path / f"{i}.parquet" for i in range(len(parts))]
    for part, file in zip(parts, files, strict=True):
        pq.write_table(part, file)
    assert stage.learn(reversed(files)) == whole
    by_hash = sorted(held, key=lambda t: rank(held.index(t)))
    for fraction, size in ((0.2, 10**6), (1.0, 700), (1.0, 1)):
        spy = Spy(vocab_size=300)
        stage = Tokenise(vocabulary=spy, sample_fraction=fraction, sample_bytes=size)
        stage.learn(parts[::-1])
        chosen = [text for text in by_hash if rank(held.index(text)) < fraction]
        before = np.cumsum([0] + [len(text) for text in chosen[:-1]])
        expected = [text for text, used in zip(chosen, before, strict=True) if used < size]
        assert spy.seen == [expected] and 0 < len(expected) <= 200
    assert Tokenise(vocabulary=Bytes()).learn([]) == ByteTokenizer()
    with pytest.raises(UserError, match="no record is left to learn"):
        Tokenise().learn([])
    with pytest.raises(UserError, match="no record is in the sample"):
        Tokenise(sample_fraction=1e-15).learn(parts)


def test_prepare_needs_no_jax() -> None:
    code = "import sys, lmjax.prepare.tokenise; assert 'jax' not in sys.modules, 'jax'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_recorded_calls_and_bad_fields() -> None:
    stage = build(call(Tokenise, vocabulary=call(Unigram, vocab_size=300), engine="tokenizers"))
    assert stage == Tokenise(vocabulary=Unigram(vocab_size=300), engine="tokenizers")
    for fields, message in (
        ({"engine": "tiktok"}, "Did you mean 'tiktoken'"),
        ({"sample_fraction": 0.0}, "sample_fraction is 0.0"),
        ({"sample_bytes": 0}, "sample_bytes is 0"),
    ):
        with pytest.raises(UserError, match=message):
            Tokenise(**fields)
    with pytest.raises(UserError, match="vocab_size is 258"):
        Unigram(vocab_size=258)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tiktoken", "gigatoken"])
def test_a_megabyte_in_many_languages(engine: encoders.Engine) -> None:
    pytest.importorskip(engine)
    held = multilingual()
    learned = BPE(vocab_size=4096).learn(held[::3], [])
    assert isinstance(learned, SubwordTokenizer)
    assert_encodes(learned, engine, held)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@pytest.mark.parametrize("engine", ["tiktoken", "gigatoken"])
def test_published_vocabularies(name: str, engine: encoders.Engine) -> None:
    pytest.importorskip(engine)
    tokenizer = Pretrained(path=str(npm_folder(name))).learn([], [])
    assert isinstance(tokenizer, SubwordTokenizer)
    assert_encodes(tokenizer, engine, [*multilingual(), *texts(20)])
