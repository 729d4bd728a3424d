"""Pairs of texts as a data set: several pairs to a row, each seen by itself alone."""

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
from lmjax.data.cache import cache_folder, is_sealed, write_atomically
from lmjax.data.corpus import Split
from lmjax.data.pair_rows import Rows, write_rows
from lmjax.data.pairs import NUMBERS, Pair, Pairs, read_pairs, reversed_pair, split_pairs
from lmjax.data.quarantine import Bad, set_aside
from lmjax.data.shuffled import InRows
from lmjax.data.source import find_files
from lmjax.data.tokenizer import TextTokenizer
from lmjax.data.vocabulary import BPE, Vocabulary
from lmjax.errors import UserError, did_you_mean

log = logging.getLogger("lmjax")
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Parallel(InRows):
    """Translation pairs of one shared vocabulary; honours `core.TextDataset`.

    An example is a row of one or more pairs: `source`, `source_segments` and `source_positions`
    (int32 [source_length]), `targets`, `segments` and `positions` (int32 [length]), and `weights`
    (float32 [length], 0 for padding). Segments count the row's pairs from 1, and are 0 for padding;
    positions count from the start of each text. A source is what `encode_prompt` makes of its text,
    as in decoding; a target ends with `end_id`, which counts.

    Pairs are put into rows once, each into the fullest of the open rows that holds both of its
    sides, and an epoch is a permutation of the rows, drawn from (seed, epoch). The validation split
    comes in order. Pairs longer than a row are left out, and counted: see `counts`.

    Args:
      path, target_path, source_field, target_field, document_field: see `pairs.read_pairs`.
      length: tokens of targets in a row.
      source_length: tokens of sources in a row; `length` where not given.
      vocabulary: learned on both sides of the training split.
      split: "train" or "valid"; see `pairs.split_pairs`.
      valid_fraction: the share of documents that is held out.
      packing: "fit", or "none" for one pair to a row.
      reverse: translates from targets to sources, as back-translation needs. The vocabulary and the
        split are the same.
      workers: processes that read batches; 0 reads in this one. Batches do not depend on it.
    """

    path: str = NUMBERS
    target_path: str = ""
    source_field: str = "source"
    target_field: str = "target"
    document_field: str = ""
    length: int = 128
    source_length: int | None = None
    vocabulary: Vocabulary = field(default_factory=BPE)
    split: Split = "train"
    valid_fraction: float = 0.1
    packing: Literal["fit", "none"] = "fit"
    reverse: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values and paths that cannot work."""
        for name, given, allowed in (
            ("split", self.split, ("train", "valid")),
            ("packing", self.packing, ("fit", "none")),
        ):
            if given not in allowed:
                raise UserError(f"{name} is {given!r}." + did_you_mean(str(given), allowed))
        for name, size in (("length", self.length), ("source_length", self._source_length)):
            if size < 1:
                raise UserError(f"{name} is {size}: give at least 1 token.")
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid_fraction is {self.valid_fraction}: give one in [0, 1).")
        check_workers(self.workers)
        for path in (self.path, *([self.target_path] if self.target_path else [])):
            if path != NUMBERS:
                find_files(path)

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        lengths = {"": self.length, "source_": self._source_length}
        spec = {
            f"{prefix}{name}": jax.ShapeDtypeStruct((length,), np.int32)
            for prefix, length in lengths.items()
            for name in ("segments", "positions")
        }
        return {
            "source": spec["source_segments"],
            "targets": spec["segments"],
            "weights": jax.ShapeDtypeStruct((self.length,), np.float32),
            **spec,
        }

    def check(self) -> None:
        """Opens the corpus; raises UserError where it cannot give one example."""
        _ = self._rows

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, learned at first use and shared by both sides and splits."""
        return _tokenizer(self._corpus)

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer.to_json()}

    @property
    def vocab_size(self) -> int:
        """How many token ids there are; reads the corpus only where nothing else tells."""
        return self.vocabulary.vocab_size or self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of."""
        return hashlib.sha256(self._rows.folder.name.encode()).hexdigest()

    @functools.cached_property
    def pairs(self) -> Sequence[Pair]:
        """The texts of this split, those among them that are too long for a row."""
        found = _pairs(self._corpus)
        pairs = found.train if self.split == "train" else found.valid
        return [reversed_pair(pair) for pair in pairs] if self.reverse else pairs

    @property
    def counts(self) -> Mapping[str, int]:
        """Of the whole corpus what was kept, refused and left out; of this split's rows the rest.

        What was refused lies by name and reason in `refused`.
        """
        return {**_pairs(self._corpus).counts, **self._rows.counts}

    @property
    def refused(self) -> Sequence[Bad]:
        """The rows of the corpus that are no pair."""
        return _pairs(self._corpus).refused

    @property
    def _source_length(self) -> int:
        return self.length if self.source_length is None else self.source_length

    @property
    def _corpus(self) -> Corpus:
        return Corpus(
            path=self.path,
            target_path=self.target_path,
            source_field=self.source_field,
            target_field=self.target_field,
            document_field=self.document_field,
            valid_fraction=self.valid_fraction,
            vocabulary=self.vocabulary,
        )

    @functools.cached_property
    def _rows(self) -> Rows:
        if not self.pairs:
            raise UserError(
                f"the {self.split} split of {self.path} holds no pairs: valid_fraction is "
                f"{self.valid_fraction}; choose one that leaves pairs in both halves."
            )
        lengths = self._source_length, self.length
        made_of = (_VERSION, self.tokenizer.hash, lengths, self.packing)
        key = hashlib.sha256(repr(made_of).encode())
        for pair in self.pairs:
            key.update(hashlib.sha256(f"{pair.source}\0{pair.target}".encode()).digest())
        folder = cache_folder() / "pairs" / key.hexdigest()
        if not is_sealed(folder):
            write_atomically(
                folder,
                lambda made: write_rows(made, self.pairs, self.tokenizer, lengths, self.packing),
            )
        rows = Rows(folder, lengths)
        if not rows.num_rows:
            raise UserError(
                f"no pair of the {self.split} split of {self.path} fits into {lengths[0]} tokens "
                f"of source and {lengths[1]} of target: raise length."
            )
        counts = {**_pairs(self._corpus).counts, **rows.counts}
        log.info("%s of %s: %s", self.split, self.path, counts)
        return rows


def validation(of: Parallel) -> Parallel:
    """The validation split of the same corpus, read with the same tokenizer."""
    return replace(of, split="valid")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What pairs are read from and with; hashable, so that a process reads each corpus once."""

    path: str
    target_path: str
    source_field: str
    target_field: str
    document_field: str
    valid_fraction: float
    vocabulary: Vocabulary


@functools.lru_cache(maxsize=4)
def _pairs(corpus: Corpus) -> Pairs:
    pairs, refused = read_pairs(
        corpus.path,
        target_path=corpus.target_path,
        source_field=corpus.source_field,
        target_field=corpus.target_field,
        document_field=corpus.document_field,
    )
    found = split_pairs(pairs, refused, fraction=corpus.valid_fraction)
    if not found.train:
        raise UserError(
            f"{corpus.path} holds no pair to train on: {len(pairs)} pairs were read, "
            f"{len(refused)} rows refused, and valid_fraction is {corpus.valid_fraction}."
        )
    set_aside(corpus.path, len(pairs), refused)
    return found


@functools.lru_cache(maxsize=4)
def _tokenizer(corpus: Corpus) -> TextTokenizer:
    found = _pairs(corpus)
    train, valid = (
        [text for p in half for text in (p.source, p.target)] for half in (found.train, found.valid)
    )
    return corpus.vocabulary.learn(train, valid)
