"""Preferences as a data set: prompts with a better and a worse completion, or with a judged one."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import numpy as np

from lmjax.core import Spec
from lmjax.data.batches import check_workers
from lmjax.data.corpus import Split
from lmjax.data.preference_rows import MADE, Kind, Row, digest, read_rows, text_of
from lmjax.data.preference_tokens import SIDES, Encoded, Examples, encode
from lmjax.data.quarantine import Bad, set_aside
from lmjax.data.shuffled import InRows
from lmjax.data.source import find_files
from lmjax.data.tokenizer import TextTokenizer
from lmjax.data.vocabulary import Bytes, Vocabulary
from lmjax.errors import UserError, did_you_mean

log = logging.getLogger("lmjax")


@dataclass(frozen=True, kw_only=True)
class Preferences(InRows):
    """Prompts with completions; honours `core.TextDataset`.

    An example of kind "pairs" has `chosen_tokens`, `chosen_targets` and `chosen_segments` (int32
    [length]) and `chosen_weights` (float32 [length]), and `rejected_...` likewise. Targets are the
    next tokens of prompt and completion; weights are 1 where they belong to the completion;
    segments are 1, and 0 for what pads the row.

    An example of kind "labelled" has `tokens`, `targets`, `segments` and `weights`, `labels` (int32
    []: 1 where the completion is desirable), and `kl_tokens`, ... of the same prompt with another
    completion: that of the nearest row before it, in the split's order, which has another prompt
    (the rows are a ring). From these the reference point of KTO is estimated.

    A prompt that is a text is what `encode_prompt` makes of it, its completion the text's tokens
    and the document's end: the two are never spelled together, as in decoding. Messages go through
    the tokenizer's chat template; the completion begins where the whole conversation's tokens
    depart from the prompt's.

    Rows with an empty side, with equal sides or without a label are set aside: how many for which
    reason is logged, and which they are is written below the cache. The training split comes in
    another order each epoch, the other in its own.

    Args:
      path, kind: see `preference_rows.read_rows`.
      length: tokens in a text.
      too_long: what becomes of a longer text. "cut": the prompt loses its beginning, in both texts
        of a pair the same; "drop": the row is left out. Where a completion has no room beside one
        token of the prompt the row is left out either way. See `counts`.
      vocabulary: what the texts are read with.
      split: "train" or "valid".
      valid_fraction: the share that is held out, drawn by the sha256 of the prompt, so that no
        prompt is in both.
      workers: processes that read batches; 0 reads in this one.
    """

    path: str = MADE
    kind: Kind = "pairs"
    length: int = 512
    too_long: Literal["cut", "drop"] = "cut"
    vocabulary: Vocabulary = field(default_factory=Bytes)
    split: Split = "train"
    valid_fraction: float = 0.1
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values and paths that cannot work."""
        for name, given, allowed in (
            ("split", self.split, ("train", "valid")),
            ("kind", self.kind, tuple(SIDES)),
            ("too_long", self.too_long, ("cut", "drop")),
        ):
            if given not in allowed:
                raise UserError(f"{name} is {given!r}." + did_you_mean(str(given), allowed))
        if self.length < 2:
            raise UserError(f"length is {self.length}: give at least 2 tokens.")
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid_fraction is {self.valid_fraction}: give one in [0, 1).")
        check_workers(self.workers)
        if self.path != MADE:
            find_files(self.path)

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        ids = jax.ShapeDtypeStruct((self.length,), np.int32)
        spec: dict[str, jax.ShapeDtypeStruct] = {}
        for side in SIDES[self.kind]:
            spec |= {f"{side}{part}": ids for part in ("tokens", "targets", "segments")}
            spec[f"{side}weights"] = jax.ShapeDtypeStruct((self.length,), np.float32)
        if self.kind == "labelled":
            spec["labels"] = jax.ShapeDtypeStruct((), np.int32)
        return spec

    def check(self) -> None:
        """Reads the rows; raises UserError where none can be learned from."""
        _ = self._encoded

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, learned of the training split at first use."""
        return _tokenizer(self._corpus)

    @property
    def vocab_size(self) -> int:
        """How many token ids there are; reads the rows only where nothing else tells."""
        return self.vocabulary.vocab_size or self.tokenizer.vocab_size

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer.to_json()}

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of tokens, labels, kind and length."""
        key = hashlib.sha256(repr((self.split, self.kind, self.length)).encode())
        held = self._encoded
        for array in (held.ids, held.starts, held.labels, held.others):
            key.update(array.tobytes())
        return key.hexdigest()

    @property
    def counts(self) -> Mapping[str, int]:
        """Of the whole file `good` and `set aside`; of this split `refused`, `left out`, `cut`.

        Refused is what the chat template refuses, left out what is too long.
        """
        rows = _rows(self._corpus)
        whole = {"good": len(rows.train) + len(rows.valid), "set aside": len(rows.bad)}
        return {**whole, **self._encoded.counts}

    @property
    def bad(self) -> Sequence[Bad]:
        """The rows of the whole file that are set aside."""
        return _rows(self._corpus).bad

    @property
    def _rows(self) -> Examples:
        return Examples(self._encoded, self.kind, self.length)

    @property
    def _corpus(self) -> _Corpus:
        return _Corpus(self.path, self.kind, self.valid_fraction, self.vocabulary)

    @functools.cached_property
    def _encoded(self) -> Encoded:
        rows = _rows(self._corpus)
        chosen = rows.train if self.split == "train" else rows.valid
        if not chosen:
            raise UserError(
                f"the {self.split} split of {self.path} is empty: change valid_fraction, which is "
                f"{self.valid_fraction}."
            )
        found = encode(chosen, self.tokenizer, length=self.length, drop=self.too_long == "drop")
        log.info("%s of %s: %d rows; %s", self.split, self.path, len(found.labels), found.counts)
        if not len(found.labels):
            raise UserError(
                f"no row of the {self.split} split of {self.path} is left ({found.counts}): raise "
                f"length, which is {self.length}, or mend the rows ({found.why})."
            )
        return found


def validation(of: Preferences) -> Preferences:
    """The validation split of the same rows."""
    return replace(of, split="valid")


def vocab_size(of: Preferences) -> int:
    """How many token ids the data uses, for a model's configuration."""
    return of.vocab_size


@dataclass(frozen=True)
class _Rows:
    """The good rows by split, and the bad."""

    train: Sequence[Row]
    valid: Sequence[Row]
    bad: Sequence[Bad]


@dataclass(frozen=True)
class _Corpus:
    """What both splits share; hashable, so that it is read once."""

    path: str
    kind: Kind
    valid_fraction: float
    vocabulary: Vocabulary


@functools.lru_cache(maxsize=4)
def _rows(corpus: _Corpus) -> _Rows:
    good, bad = read_rows(corpus.path, kind=corpus.kind)
    set_aside(corpus.path, len(good), bad)
    limit = int(corpus.valid_fraction * 2**64)
    held = [int.from_bytes(digest(row.prompt)[:8], "big") < limit for row in good]
    pairs = list(zip(good, held, strict=True))
    return _Rows([r for r, out in pairs if not out], [r for r, out in pairs if out], bad)


@functools.lru_cache(maxsize=4)
def _tokenizer(corpus: _Corpus) -> TextTokenizer:
    rows = _rows(corpus)
    train, valid = (
        [text_of(side) for row in part for side in (row.prompt, *row.completions)]
        for part in (rows.train, rows.valid)
    )
    return corpus.vocabulary.learn(train, valid)
