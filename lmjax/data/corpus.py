"""A corpus in two halves, training and validation, and the tokens of each on disk."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmjax.data.cache import cache_folder, is_sealed, seal_folder, write_atomically
from lmjax.data.source import Document, read_documents
from lmjax.data.tokenizer import TextTokenizer
from lmjax.data.vocabulary import Vocabulary
from lmjax.errors import UserError

Split = Literal["train", "valid"]
SplitBy = Literal["auto", "document", "tail"]


def split_documents(
    documents: Sequence[Document], *, fraction: float, by: SplitBy = "auto"
) -> tuple[list[Document], list[Document]]:
    """Parts the documents into (train, valid), the same way for every seed.

    Args:
      documents: at least one.
      fraction: the share that goes to validation; 0 leaves it empty.
      by: "document" draws whole documents by the sha256 of their text, at least one for each half,
        so that a validation text, or a copy of it, is never trained on. "tail" takes the last
        characters of each document, as nanoGPT does of its one file: the first
        `int(n * (1 - fraction))` characters train. "auto" is "document" where there are several.
    """
    if fraction == 0:
        return list(documents), []
    if by == "tail" or (by == "auto" and len(documents) == 1):
        cuts = [int(len(d.text) * (1 - fraction)) for d in documents]
        parts = list(zip(documents, cuts, strict=True))
        train = [Document(name=d.name, text=d.text[:cut]) for d, cut in parts if cut > 0]
        valid = [
            Document(name=d.name, text=d.text[cut:], begin=cut)
            for d, cut in parts
            if cut < len(d.text)
        ]
        return train, valid
    digests = [_digest(document.text) for document in documents]
    ranked = sorted(set(digests))
    if len(ranked) < 2:
        raise UserError(
            "split_by='document' needs two different documents, and the corpus holds one. Use "
            "split_by='tail', or valid_fraction=0 for no validation."
        )
    held = set(ranked[: min(max(1, round(fraction * len(ranked))), len(ranked) - 1)])
    pairs = list(zip(documents, digests, strict=True))
    return [d for d, key in pairs if key not in held], [d for d, key in pairs if key in held]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where documents come from, how they are split, and what they are read with.

    Hashable, so that everything read or learned for one corpus is shared within the process.
    """

    path: str
    text_field: str
    tfds_split: str
    tfds_dir: str
    valid_fraction: float
    split_by: SplitBy
    vocabulary: Vocabulary

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that the vocabulary makes of this corpus."""
        return _tokenizer(self)

    def documents(self, split: Split) -> Sequence[Document]:
        """The documents of a split, in the order of their tokens."""
        return _split(self)[split]

    def tokens(self, split: Split, *, end_each: bool) -> Tokens:
        """The tokens of a split. With `end_each`, or several documents, each gets its end."""
        return _tokens(self, split, end_each)


@dataclass(frozen=True)
class Tokens:
    """Documents one after another, memory-mapped from a folder; pickles as the folder's name.

    Shapes: ids [tokens], unsigned; starts [documents], int64, where each document begins.
    """

    folder: Path

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Token ids as stored."""
        return np.asarray(np.load(self.folder / "ids.npy", mmap_mode="r"))

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins."""
        return np.asarray(np.load(self.folder / "starts.npy"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopened, not copied, in another process."""
        return Tokens, (self.folder,)


@functools.lru_cache(maxsize=2)
def _split(corpus: Corpus) -> dict[Split, list[Document]]:
    documents = read_documents(
        corpus.path,
        text_field=corpus.text_field,
        tfds_split=corpus.tfds_split,
        tfds_dir=corpus.tfds_dir,
    )
    train, valid = split_documents(documents, fraction=corpus.valid_fraction, by=corpus.split_by)
    return {"train": train, "valid": valid}


@functools.lru_cache(maxsize=8)
def _tokenizer(corpus: Corpus) -> TextTokenizer:
    split = _split(corpus)
    return corpus.vocabulary.learn(
        [d.text for d in split["train"]], [d.text for d in split["valid"]]
    )


@functools.lru_cache(maxsize=16)
def _tokens(corpus: Corpus, split: Split, end_each: bool) -> Tokens:
    documents = _split(corpus)[split]
    if not documents:
        raise UserError(
            f"the {split} split of {corpus.path} is empty: valid_fraction is "
            f"{corpus.valid_fraction}; choose one that leaves text in both halves."
        )
    tokenizer = corpus.tokenizer()
    end_each = end_each or len(documents) > 1
    key = hashlib.sha256(f"{tokenizer.hash} {end_each}".encode())
    for document in documents:
        key.update(_digest(document.text))
    folder = cache_folder() / "tokens" / key.hexdigest()
    if not is_sealed(folder):
        end = [tokenizer.end_id] if end_each else []
        rows = (np.append(tokenizer.encode(d.text), end) for d in documents)
        write_atomically(folder, lambda made: _write(made, rows, tokenizer.vocab_size))
    return Tokens(folder)


def _write(folder: Path, rows: Iterable[np.ndarray], vocab_size: int) -> None:
    kept = [row.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32) for row in rows]
    ends = np.cumsum([0] + [len(row) for row in kept])
    folder.mkdir()
    np.save(folder / "ids.npy", np.concatenate(kept))
    np.save(folder / "starts.npy", ends[:-1])
    seal_folder(folder)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
