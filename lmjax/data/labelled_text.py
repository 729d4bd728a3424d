"""Texts with labels as a data set: one text a row, its tokens and its class."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import check_workers
from lmjax.data.corpus import Split
from lmjax.data.encoded import encode_texts, pad_rows
from lmjax.data.labelled_rows import LabelFrom, Row, read_rows
from lmjax.data.quarantine import Bad, beginning, set_aside
from lmjax.data.shuffled import InRows
from lmjax.data.tokenizer import TextTokenizer
from lmjax.data.vocabulary import Bytes, Vocabulary
from lmjax.errors import UserError, did_you_mean

log = logging.getLogger("lmjax")


@dataclass(frozen=True, kw_only=True)
class LabelledText(InRows):
    """One text a row, and its class; honours `core.LabelledDataset` and `core.TextDataset`.

    An example has tokens (int32 [length]: the text between what the tokenizer puts around one,
    BERT's [CLS] and [SEP]; zeros after it), segments (int32 [length]: 1, and 0 for what pads the
    row), labels (int32 []) and weights (float32 []: 1). A longer text loses its end. All is held in
    memory.

    A row without text or label, with another label than `labels` names, or whose bytes are not of
    the encoding is set aside: how many for which reason is logged, and which they are is written
    below the cache. The training split comes in another order each epoch, the other in its own.

    Args:
      path: see `labelled_rows.read_rows`.
      label_from, text_field, label_field, split_field, encoding: likewise.
      labels: the classes in their order; () for those that the rows have, sorted.
      length: tokens in an example.
      vocabulary: what the texts are read with.
      split: "train" or "valid".
      valid_fraction: the share that is held out, drawn by the sha256 of the text, so that copies
        of a text are never in both.
      valid_value: with `split_field`, what it says of the rows that are held out; those that train
        are "train", and others belong to neither.
      max_rows: if not 0, at most so many rows of the split, drawn likewise.
      workers: processes that read batches.
    """

    path: str
    label_from: LabelFrom = "field"
    text_field: str = "text"
    label_field: str = "label"
    split_field: str = ""
    encoding: str = "utf-8"
    labels: Sequence[str] = ()
    length: int = 128
    vocabulary: Vocabulary = field(default_factory=Bytes)
    split: Split = "train"
    valid_fraction: float = 0.1
    valid_value: str = "valid"
    max_rows: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values that cannot work."""
        for name, given, allowed in (
            ("split", self.split, ("train", "valid")),
            ("label_from", self.label_from, ("field", "folder", "file")),
        ):
            if given not in allowed:
                raise UserError(f"{name} is {given!r}." + did_you_mean(str(given), allowed))
        if self.length < 1 or self.max_rows < 0:
            raise UserError(
                f"length is {self.length} and max_rows {self.max_rows}: give at least 1 and 0."
            )
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid_fraction is {self.valid_fraction}: give one in [0, 1).")
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels is {list(self.labels)}: give each class once.")
        check_workers(self.workers)

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        return {
            "tokens": jax.ShapeDtypeStruct((self.length,), np.int32),
            "segments": jax.ShapeDtypeStruct((self.length,), np.int32),
            "labels": jax.ShapeDtypeStruct((), np.int32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def check(self) -> None:
        """Reads the rows; raises UserError where they cannot be learned from."""
        _ = self._encoded

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels; reads the rows where `labels` does not name them."""
        return tuple(self.labels) or self._corpus.rows().classes

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, learned of the training split at first use."""
        return self._corpus.tokenizer()

    @property
    def vocab_size(self) -> int:
        """How many token ids there are; reads the rows only where nothing else tells."""
        return self.vocabulary.vocab_size or self.tokenizer.vocab_size

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer and the classes."""
        names = json.dumps(self.classes, ensure_ascii=False)
        return {"tokenizer": self.tokenizer.to_json(), "classes": names}

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of tokens, labels, split and length."""
        key = hashlib.sha256(repr((self.split, self.length, self.classes)).encode())
        for array in (self._encoded.ids, self._encoded.starts, self._encoded.labels):
            key.update(array.tobytes())
        return key.hexdigest()

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of this split, in their order."""
        rows = self._corpus.rows().of(self.split)
        if not self.max_rows or len(rows) <= self.max_rows:
            return rows
        limit = sorted(_digest(row.text)[8:16] for row in rows)[self.max_rows - 1]
        return [row for row in rows if _digest(row.text)[8:16] <= limit][: self.max_rows]

    @property
    def _rows(self) -> _Examples:
        return _Examples(self._encoded, self.length)

    @functools.cached_property
    def _corpus(self) -> _Corpus:
        return _Corpus(
            path=self.path,
            label_from=self.label_from,
            text_field=self.text_field,
            label_field=self.label_field,
            split_field=self.split_field,
            encoding=self.encoding,
            labels=tuple(self.labels),
            valid_fraction=self.valid_fraction,
            valid_value=self.valid_value,
            vocabulary=self.vocabulary,
        )

    @functools.cached_property
    def _encoded(self) -> Encoded:
        rows = self.rows
        if not rows:
            raise UserError(
                f"the {self.split} split of {self.path} is empty: change valid_fraction, or "
                "split_field and valid_value."
            )
        counts = collections.Counter(row.label for row in rows)
        if self.split == "train" and len(counts) < 2:
            raise UserError(
                f"the training split of {self.path} holds one class only, {rows[0].label!r}: there "
                "is nothing to tell apart. Give rows of several classes."
            )
        number = {name: i for i, name in enumerate(self.classes)}
        texts = encode_texts(self.tokenizer, [row.text for row in rows], length=self.length)
        shown = ", ".join(f"{name}: {counts[name]}" for name in self.classes)
        log.info(
            "%s, %s: %d rows (%s), %d of them cut to %d tokens",
            *(self.path, self.split, len(rows), shown, texts.num_cut, self.length),
        )
        labels = np.array([number[row.label] for row in rows], np.int32)
        return Encoded(texts.ids, texts.starts, labels)


def validation(of: LabelledText, *, max_rows: int = 0) -> LabelledText:
    """The validation split of the same rows."""
    return replace(of, split="valid", max_rows=max_rows)


def vocab_size(of: LabelledText) -> int:
    """How many token ids the data uses, for a model's configuration."""
    return of.vocab_size


@dataclass(frozen=True)
class Encoded:
    """The rows of a split: ids [tokens], starts [rows + 1], labels [rows]."""

    ids: np.ndarray
    starts: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class _Examples:
    """The rows of a split, by number."""

    encoded: Encoded
    length: int

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.encoded.labels)

    def rows(self, examples: Sequence[int]) -> Batch:
        """These rows, stacked."""
        chosen = list(examples)
        texts = pad_rows(self.encoded.ids, self.encoded.starts, chosen, self.length)
        weights = np.ones(len(chosen), np.float32)
        return {**texts, "labels": self.encoded.labels[chosen], "weights": weights}


@dataclass(frozen=True)
class _Rows:
    """The good rows by split, and their classes."""

    train: Sequence[Row]
    valid: Sequence[Row]
    classes: tuple[str, ...]

    def of(self, split: Split) -> Sequence[Row]:
        return self.train if split == "train" else self.valid


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """What both splits share; hashable, so that it is read once."""

    path: str
    label_from: LabelFrom
    text_field: str
    label_field: str
    split_field: str
    encoding: str
    labels: tuple[str, ...]
    valid_fraction: float
    valid_value: str
    vocabulary: Vocabulary

    def rows(self) -> _Rows:
        """The good rows; the bad are reported."""
        return _rows(self)

    def tokenizer(self) -> TextTokenizer:
        """What the vocabulary makes of the texts."""
        return _tokenizer(self)


@functools.lru_cache(maxsize=4)
def _rows(corpus: _Corpus) -> _Rows:
    good, bad = read_rows(
        corpus.path,
        label_from=corpus.label_from,
        text_field=corpus.text_field,
        label_field=corpus.label_field,
        split_field=corpus.split_field,
        encoding=corpus.encoding,
    )
    classes = corpus.labels or tuple(sorted({row.label for row in good}))
    unknown = sorted({row.label for row in good} - set(classes))
    if len(unknown) == len({row.label for row in good}):
        raise UserError(
            f"{corpus.path} has none of the labels {list(classes)}; it has {unknown[:8]}."
        )
    bad += [
        Bad(row.name, f"the label {row.label[:40]!r} is no class", beginning(row.text))
        for row in good
        if row.label in set(unknown)
    ]
    good = [row for row in good if row.label not in set(unknown)]
    if len(classes) < 2:
        raise UserError(
            f"{corpus.path} holds one class only, {classes[0]!r}: there is nothing to tell apart. "
            "Give rows of several classes."
        )
    set_aside(corpus.path, len(good), bad)
    if corpus.split_field:
        train = [row for row in good if row.part == "train"]
        return _Rows(train, [row for row in good if row.part == corpus.valid_value], classes)
    limit = int(corpus.valid_fraction * 2**64)
    held = [int.from_bytes(_digest(row.text)[:8], "big") < limit for row in good]
    pairs = list(zip(good, held, strict=True))
    return _Rows([r for r, out in pairs if not out], [r for r, out in pairs if out], classes)


@functools.lru_cache(maxsize=4)
def _tokenizer(corpus: _Corpus) -> TextTokenizer:
    rows = _rows(corpus)
    texts = ([row.text for row in part] for part in (rows.train, rows.valid))
    return corpus.vocabulary.learn(*texts)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
