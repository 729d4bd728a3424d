"""Corpora: whatever bytes lie in the files, they become the text that they spell, or an error."""

import gzip
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.data.cache import cache_folder
from lmjax.data.corpus import Corpus
from lmjax.data.mixture import Mixture
from lmjax.data.source import find_files, read_documents
from lmjax.data.text import Text
from lmjax.data.vocabulary import BPE, Bytes, Characters
from tests.fuzz.outcome import examples, few_and_many, outcome

NAMES = st.sampled_from(
    [
        "a.txt",
        "b.jsonl",
        "c.txt.gz",
        "d.jsonl.gz",
        "e",
        "f.md",
        "g.JSONL",
        "h.GZ",
        ".hidden",
        "i.bin",
    ]
)
LINES = st.sampled_from(
    [
        *(
            b'{"text": "good text"}',
            b'{"text": ""}',
            b'{"txet": "x"}',
            b'{"text": 5}',
            b"[1]",
            b"5",
        ),
        *(b'{"text": null}', b'{"text": "cut', b'{"text": "\\ud800"}', b'{"text": "\\u0000"}', b""),
        *(b"\xef\xbb\xbf{}", b'{"text": "a", "text": "b"}', b"NaN", b"[" * 3000, b"9" * 5000),
        *(b"\xff\xfe", b'{"text": {"text": "x"}}', b"null", b"\r", b"   ", b"{}"),
    ]
)
CONTENTS = (
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
    | st.text(max_size=20).map(lambda text: text.encode("utf-16"))
    | st.lists(LINES, max_size=5).map(b"\n".join)
    | st.sampled_from([b"", b"\n" * 50, b"word " * 400, b"x" * 100_000])
)
VOCABULARIES = st.sampled_from([Bytes(), Characters(), BPE(vocab_size=260)])


def damaged(data, content):
    """A gzip file of the content, sound or not."""
    packed = gzip.compress(content, mtime=0)
    at = data.draw(st.integers(0, len(packed) - 1))
    match data.draw(st.integers(0, 3)):
        case 0:
            return packed[:at]
        case 1:
            return (
                packed[:at]
                + bytes([packed[at] ^ (1 << data.draw(st.integers(0, 7)))])
                + packed[at + 1 :]
            )
        case 2:
            return packed + data.draw(st.binary(max_size=8))
        case _:
            return packed


@few_and_many(150, 1000)
def test_files(count, tmp_path_factory):
    """What is read of one file is what it holds."""
    folder = tmp_path_factory.mktemp("files")

    @examples(count)
    @given(st.data())
    def check(data):
        path = folder / data.draw(NAMES)
        content = data.draw(CONTENTS)
        zipped = path.suffix.lower() == ".gz"
        path.write_bytes(damaged(data, content) if zipped else content)
        documents, message = outcome(lambda: read_documents(str(path)))
        if message is not None:
            assert str(path) in message
        elif ".jsonl" in path.name.lower():
            records = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
            assert [d.text for d in documents] == [r["text"] for r in records if r["text"]]
        else:
            assert "".join(d.text for d in documents).encode() == content

    check()


@few_and_many(60, 500)
def test_data_sets(count, tmp_path_factory):
    """Folders of such files, cut into windows: batches of tokens in range, or a reason."""

    @examples(count)
    @given(st.data())
    def check(data):
        folder = tmp_path_factory.mktemp("folder")
        for name, content in data.draw(st.dictionaries(NAMES, CONTENTS, max_size=3)).items():
            (folder / name).write_bytes(
                gzip.compress(content, mtime=0) if name.lower().endswith(".gz") else content
            )
        fields = {
            "length": data.draw(st.sampled_from([1, 8, 64, 10**9])),
            "vocabulary": data.draw(VOCABULARIES),
            "valid_fraction": data.draw(st.sampled_from([0, 0.1, 0.999999, 1e-12])),
            "split": data.draw(st.sampled_from(["train", "valid"])),
            "split_by": data.draw(st.sampled_from(["auto", "document", "tail"])),
            "packing": data.draw(st.sampled_from(["documents", "stream"])),
            "text_field": data.draw(st.sampled_from(["text", "", "txet"])),
        }

        def read():
            text = Text(path=str(folder), **fields)
            text.check()
            batches = text.batches(batch_size=2, seed=0, start=data.draw(st.integers(0, 10**12)))
            try:
                return text, next(batches)
            finally:
                batches.close()

        read_, message = outcome(read)
        if message is None:
            text, batch = read_
            assert batch["tokens"].shape == (2, fields["length"])
            assert batch["tokens"].min() >= 0 and batch["targets"].max() < text.vocab_size
            assert np.isfinite(batch["target_bytes"]).all()

    check()


@few_and_many(100, 1000)
def test_paths(count):
    """Names of files that are none."""
    pieces = st.sampled_from(
        ["/", "*", "**", "?", "[", "]", "~", "~x", "..", ".", "\0", "\ud800", "tfds:"]
    )

    @examples(count)
    @given(st.text(max_size=10) | st.lists(pieces, max_size=4).map("".join) | st.just("x" * 5000))
    def check(path):
        if not path.startswith(("/", "..", "tfds:", ".", "~", "*", "?")):  # not the whole disk
            outcome(lambda: find_files(f"no/{path}") if "*" in path else find_files(path))

    check()


@pytest.mark.parametrize("kind", ["fifo", "loop", "dangling", "device", "unreadable"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "x.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    _, message = outcome(lambda: read_documents(str(path)))
    assert message is not None and str(path) in message


WEIGHTS = st.floats() | st.sampled_from([0, -1, 1, 10**30, 1e-300, 1e300, "1", None, True])


@few_and_many(60, 500)
def test_mixtures(count, corpus):
    sources = {name: Text(path=corpus, length=8, vocabulary=Bytes()) for name in "ab"}

    @examples(count)
    @given(st.dictionaries(st.sampled_from(["a", "b", "c"]), WEIGHTS), st.integers(-1, 3))
    def check(weights, workers):
        def read():
            mixture = Mixture(sources=sources, weights=weights, workers=workers)
            mixture.check()
            mixture.epochs(10)
            return mixture.examples(seed=0)[10**9]

        try:
            outcome(read)
        except TypeError:  # of a type that a config refuses before
            assert not all(isinstance(w, int | float) for w in weights.values())

    check()


@few_and_many(40, 300)
def test_a_damaged_cache_is_made_again(count, tmp_path, monkeypatch, caplog):
    """Tokens and learned vocabularies: cut, flipped, emptied or deleted, never believed."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "text.txt"
    source.write_text("the quick brown fox jumps over the lazy dog.\n" * 20)

    def read():
        corpus = Corpus(  # its functions are cached by it, so each is another
            path=str(source),
            text_field=str(next(number)),
            tfds_split="",
            tfds_dir="",
            valid_fraction=0.0,
            split_by="auto",
            vocabulary=BPE(vocab_size=270),
        )
        tokens = corpus.tokens("train", end_each=True)
        return np.array(tokens.ids), np.array(tokens.starts), corpus.tokenizer().to_json()

    number = iter(range(10**9))
    expected = read()
    files = sorted(p for p in cache_folder().rglob("*") if p.is_file())
    assert len(files) == 4

    @examples(count)
    @given(st.data())
    def check(data):
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                file.unlink()
            case 1:
                file.write_bytes(content[:at])
            case 2:
                file.write_bytes(b"")
            case _:
                flipped = content[at] ^ (1 << data.draw(st.integers(0, 7)))
                file.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        found, message = outcome(read)
        assert message is None
        for new, old in zip(found[:2], expected[:2], strict=True):
            np.testing.assert_array_equal(new, old)
        assert found[2] == expected[2]

    check()
    assert "damaged, and is made again" in caplog.text
