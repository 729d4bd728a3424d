"""A table as a data set: numbers, categories and texts of each row, and its label or values."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import jax
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.cells import Policy, Read, read_cells
from lmjax.data.columns import Columns, Scaling, fit_categorical, fit_numeric
from lmjax.data.known_tables import known_table, open_table, state_of
from lmjax.data.rows import Bad
from lmjax.data.shuffled import InRows
from lmjax.data.tokenizer import TextTokenizer
from lmjax.data.vocabulary import BPE, Vocabulary
from lmjax.errors import UserError, did_you_mean

Kind = Literal["classes", "values"]


@dataclass(frozen=True, kw_only=True)
class Table(InRows):
    """Rows of CSV or Parquet for classification or regression; honours `core.LabelledDataset`.

    An example has what the table has columns for: features (float32 [F]: scaled numbers, and for
    each column of numbers that misses some in training one more, 1 where it is missing), categories
    (int32 [K]: codes that count on from column to column, the first of each for what training did
    not see), tokens, segments (1, and 0 for padding) and positions (int32 [length]) of the texts,
    which are joined by line breaks and cut at `length`. Then either labels (int32 [], or float32
    [C] of zeros and ones where `target` names several columns) or values (float32 [], or [C]); and
    weights (float32 []: 1, and 0 for what completes a batch).

    Scaling, means, categories, classes and the vocabulary are learned of the training split alone
    and kept with the weights (`fitted`). Rows that cannot be read are left out, counted, logged and
    written into a file (`cells.read_cells`). The training split comes in a permutation of its own
    each epoch; every other split in order.

    Args:
      path: a file, a folder or a glob (.csv, .csv.gz, .parquet), or one of `known_tables.KNOWN`.
      target: the column to predict; several, with commas between, are several labels or values.
      kind: "classes" or "values".
      numeric, categorical, text: columns by what they hold. Where all three are empty, all columns
        but the target, `ignore` and the one of `split_by` are used, see `columns.infer_roles`.
      ignore: columns that are then not used.
      labels: the classes in their order; rows of others are left out as bad. Where empty, those of
        the training split, sorted.
      scaling: of the numeric columns: "standard", "minmax" or "none", see `columns.fit_numeric`.
      target_scaling: likewise of what is regressed; `unscaled` gives it back.
      missing: what to do about a row whose number is missing: "impute" (the training mean, and a
        feature that says so), "quarantine" or "refuse" (an error). A missing category is unknown.
      missing_marks: cells that say so, beside empty ones.
      min_count: categories that training sees less often are unknown.
      split: "train", "valid", or another value of the column `split_by`.
      split_by: "hash": by the row's cells, alike for equal rows; or the column that names it.
      valid_fraction: the share of rows that is held out; of splitting by hash.
      split_seed: for other splits by hash.
      valid_path: files of the validation split, in the place of a part of `path`.
      vocabulary: of the texts.
      length: tokens of a row's texts.
      delimiter: between cells of CSV.
      max_quarantined: the share of rows that may be left out as bad; more are an error.
    """

    path: str
    target: str
    kind: Kind = "classes"
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    scaling: Scaling = "standard"
    target_scaling: Scaling = "standard"
    missing: Policy = "impute"
    missing_marks: tuple[str, ...] = ("NA", "N/A", "nan", "NaN", "null", "?")
    min_count: int = 1
    split: str = "train"
    split_by: str = "hash"
    valid_fraction: float = 0.2
    split_seed: int = 0
    valid_path: str = ""
    vocabulary: Vocabulary = field(default_factory=BPE)
    length: int = 64
    delimiter: str = ","
    max_quarantined: float = 0.1

    def __post_init__(self) -> None:
        """Refuses values and paths that cannot work."""
        for name, given, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("scaling", self.scaling, get_args(Scaling)),
            ("target_scaling", self.target_scaling, get_args(Scaling)),
            ("missing", self.missing, get_args(Policy)),
        ):
            if given not in allowed:
                raise UserError(f"{name} is {given!r}." + did_you_mean(str(given), allowed))
        if self.split_by == "hash" and self.split not in ("train", "valid"):
            hint = did_you_mean(self.split, ("train", "valid"))
            raise UserError(f"split is {self.split!r}, and rows are split by hash.{hint}")
        if not 0 <= self.valid_fraction < 1 or not 0 <= self.max_quarantined <= 1:
            raise UserError(
                f"valid_fraction is {self.valid_fraction} and max_quarantined "
                f"{self.max_quarantined}: give one in [0, 1) and one in [0, 1]."
            )
        if self.length < 1 or self.min_count < 1:
            raise UserError(
                f"length is {self.length} and min_count {self.min_count}: give at least 1."
            )
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels are {list(self.labels)}: each must stand once.")
        known_table(self.path)
        if self.valid_path:
            known_table(self.valid_path)
        hashed = self.split_by == "hash" and not self.valid_path
        if hashed and self.split != "train" and not self.valid_fraction:
            raise UserError("valid_fraction is 0: no row is held out, and split is 'valid'.")

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to predict."""
        return tuple(name.strip() for name in self.target.split(","))

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads the table, which alone tells its columns."""
        return {
            name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in self._arrays.items()
        }

    def check(self) -> None:
        """Reads the table; raises UserError where nothing can be learned of it."""
        _ = self._arrays

    @functools.cached_property
    def columns(self) -> Columns:
        """What was learned of the training split's columns."""
        read = self._read
        train, roles = read.splits == "train", read.roles
        numbers = {name: x[train] for name, x in read.numbers.items()}
        cells = {k: [c for c, t in zip(v, train, strict=True) if t] for k, v in read.cells.items()}
        fit = functools.partial(fit_numeric, scaling=self.scaling)
        values = () if self.kind == "classes" else roles.targets
        return Columns(
            numeric=tuple(fit(name, numbers[name]) for name in roles.numeric),
            categorical=tuple(
                fit_categorical(name, cells[name], min_count=self.min_count)
                for name in roles.categorical
            ),
            text=roles.text,
            targets=roles.targets,
            classes=read.classes,
            values=tuple(fit_numeric(n, numbers[n], self.target_scaling) for n in values),
        )

    @property
    def fitted(self) -> Mapping[str, str]:
        """The columns and, where there are texts, the tokenizer."""
        found = {"columns": self.columns.to_json()}
        return found | ({"tokenizer": self.tokenizer.to_json()} if self.columns.text else {})

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """Of the texts, learned of the training split."""
        if not self._read.roles.text:
            raise UserError("this table has no column of text: there is nothing to tokenise.")
        texts = {True: [], False: []}  # type: dict[bool, list[str]]
        for text, split in zip(self._read.texts, self._read.splits, strict=True):
            texts[split == "train"].append(text)
        return self.vocabulary.learn(texts[True], texts[False])

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return self.vocabulary.vocab_size or self.tokenizer.vocab_size

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels, in the order of their numbers."""
        return self.columns.classes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of the split's arrays."""
        digest = hashlib.sha256(self.split.encode())
        for name, x in sorted(self._arrays.items()):
            digest.update(f"{name} {x.dtype} {x.shape}".encode() + x.tobytes())
        return digest.hexdigest()

    @property
    def quarantined(self) -> Sequence[Bad]:
        """The rows of all splits that were left out."""
        return self._read.bad

    def unscaled(self, values_NC: np.ndarray) -> np.ndarray:
        """Regressed values in the units of the table, float64."""
        return self.columns.unscaled(values_NC)

    @property
    def _rows(self) -> _Rows:
        return _Rows(self._arrays)

    @functools.cached_property
    def _read(self) -> Read:
        return _read(replace(self, split="train"), (state_of(self.path), state_of(self.valid_path)))

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """The rows of this split."""
        read, columns = self._read, self.columns
        chosen = np.flatnonzero(read.splits == self.split)
        if not len(chosen):
            there = ", ".join(sorted({str(s) for s in read.splits}))
            raise UserError(
                f"the {self.split} split of {self.path} has no row (there are: {there}): change "
                "valid_fraction, split_by or valid_path."
            )
        numbers = {name: x[chosen] for name, x in read.numbers.items()}
        cells = {name: [column[i] for i in chosen] for name, column in read.cells.items()}
        arrays: dict[str, np.ndarray] = {}
        if columns.numeric:
            arrays["features"] = columns.features(numbers)
        if columns.categorical:
            arrays["categories"] = columns.categories(cells)
        if columns.text:
            arrays |= self._tokens([read.texts[i] for i in chosen])
        if self.kind == "values":
            values_NC = columns.scaled_values(numbers)
            arrays["values"] = values_NC if len(self.targets) > 1 else values_NC[:, 0]
        else:
            arrays["labels"] = read.labels[chosen]
        return arrays | {"weights": np.ones(len(chosen), np.float32)}

    def _tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        shape = (len(texts), self.length)
        tokens = np.full(shape, self.tokenizer.end_id, np.int32)
        segments = np.zeros(shape, np.int32)
        for row, text in enumerate(texts):
            ids = self.tokenizer.encode(text)[: self.length]
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        positions = np.broadcast_to(np.arange(self.length, dtype=np.int32), shape)
        return {"tokens": tokens, "segments": segments, "positions": positions}


@functools.lru_cache(maxsize=4)
def _read(table: Table, state: object) -> Read:
    """What all splits of a table share; `state` is that of its files, which may change."""
    del state
    return read_cells(
        open_table(table.path, delimiter=table.delimiter),
        open_table(table.valid_path, delimiter=table.delimiter) if table.valid_path else None,
        name=table.path,
        targets=table.targets,
        regressed=table.kind == "values",
        roles={r: getattr(table, r) for r in ("numeric", "categorical", "text")},
        ignore=table.ignore,
        labels=table.labels,
        missing=table.missing,
        marks=frozenset((*table.missing_marks, "")),
        split_by=table.split_by,
        valid_fraction=table.valid_fraction,
        split_seed=table.split_seed,
        max_quarantined=table.max_quarantined,
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of a split, by number."""

    arrays: Mapping[str, np.ndarray]

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.arrays["weights"])

    def rows(self, examples: Sequence[int]) -> Batch:
        """These rows, stacked."""
        return {name: x[list(examples)] for name, x in self.arrays.items()}


def validation(of: Table) -> Table:
    """The validation split of the same table, read by what its training split told."""
    return replace(of, split="valid")


def num_categories(of: Table) -> int:
    """The codes of all categorical columns together, for a model's configuration."""
    return of.columns.num_categories


def vocab_size(of: Table) -> int:
    """How many token ids the data uses, for a model's configuration."""
    return of.vocab_size


def num_values(of: Table) -> int:
    """How many values are regressed, for a model's configuration."""
    return len(of.targets)
