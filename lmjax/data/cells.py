"""The cells of a table as numbers, texts and labels, and the rows that cannot be read."""

# N rows, C targets.

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmjax.data.cache import cache_folder, write_atomically
from lmjax.data.columns import Roles, infer_roles, number
from lmjax.data.rows import Bad, Rows
from lmjax.errors import UserError

log = logging.getLogger("lmjax")

Policy = Literal["impute", "quarantine", "refuse"]
_HOLDS = {"1": 1.0, "true": 1.0, "yes": 1.0, "0": 0.0, "false": 0.0, "no": 0.0}


@dataclass(frozen=True, kw_only=True)
class Read:
    """The rows that could be read, in order, and those that could not.

    Args:
      roles: which columns are read as what.
      numbers: by column of numbers and of regressed values, float64 [N]; NaN is missing.
      cells: by column of categories; "" is missing.
      texts: the cells of the columns of text, joined by line breaks.
      splits: the name of each row's split [N].
      classes: the names of the labels; empty where values are regressed.
      labels: int32 [N], or float32 [N, C] of zeros and ones; empty where values are regressed.
      bad: the rows that are left out.
    """

    roles: Roles
    numbers: Mapping[str, np.ndarray]
    cells: Mapping[str, list[str]]
    texts: list[str]
    splits: np.ndarray
    classes: tuple[str, ...]
    labels: np.ndarray
    bad: Sequence[Bad]


@dataclass(frozen=True, kw_only=True)
class _Row:
    numbers: tuple[float, ...]
    cells: tuple[str, ...]
    text: str
    targets: tuple[str, ...]
    split: str


class _Unreadable(Exception):
    """Why a row is left out."""


def read_cells(
    rows: Rows,
    valid: Rows | None,
    *,
    name: str,
    targets: Sequence[str],
    regressed: bool,
    roles: Mapping[str, Sequence[str]],
    ignore: Sequence[str],
    labels: Sequence[str],
    missing: Policy,
    marks: frozenset[str],
    split_by: str,
    valid_fraction: float,
    split_seed: int,
    max_quarantined: float,
) -> Read:
    """Reads every row by the roles of its columns; see `table.Table` for the arguments.

    Left out are rows whose number is none, without a label or with an unknown one, without text
    where nothing else is read, with another split than the table's, and what `read_rows` could not
    read. They are counted by reason in the log, and written to `$LMJAX_CACHE/quarantine`.

    Raises UserError for columns that are not there or named twice, labels of one class only, no row
    or no training row that can be read, and more than `max_quarantined` of bad rows.
    """
    by_column = split_by != "hash"
    every = [(rows, "train" if valid is not None else "")]
    every += [] if valid is None else [(valid, "valid")]
    named = Roles(targets=tuple(targets), **{r: tuple(names) for r, names in roles.items()})
    if not (named.numeric or named.categorical or named.text):
        left = [*ignore, *([split_by] if by_column else [])]
        for column in (*targets, *left):
            rows.column(column)
        named = infer_roles(rows, targets=targets, ignore=left, missing=marks)
    _check_roles(named, rows, split_by if by_column else None)
    read: list[_Row] = []
    where: list[tuple[Rows, tuple[str, int], list[str]]] = []
    for table, split in every:
        parse = _Parser(table, named, regressed, missing, marks, split_by if by_column else None)
        for cells, place in zip(table.cells, table.where, strict=True):
            try:
                row = parse.row(cells, place)
            except _Unreadable as reason:
                table.reject(cells, *place, str(reason))
                continue
            if split or not by_column:
                found = split or _hashed(cells, split_seed, valid_fraction)
                row = dataclasses.replace(row, split=found)
            read.append(row)
            where.append((table, place, cells))
    if read and not any(row.split == "train" for row in read):
        raise UserError(f"{name}: no row is left to train on: lower valid_fraction, or give more.")
    classes = _classes(read, labels, several=len(targets) > 1, regressed=regressed, targets=targets)
    kept = []
    for row, (table, place, cells) in zip(read, where, strict=True):
        if not regressed and len(targets) == 1 and row.targets[0] not in classes:
            table.reject(cells, *place, f"label outside the set: {row.targets[0]!r}")
        else:
            kept.append(row)
    bad = sorted((b for t, _ in every for b in t.bad), key=lambda b: (b.file, b.line))
    _tell(bad, len(kept), name, max_quarantined)
    numeric = [*named.numeric, *(targets if regressed else ())]
    return Read(
        roles=named,
        numbers={n: np.array([r.numbers[i] for r in kept]) for i, n in enumerate(numeric)},
        cells={n: [r.cells[i] for r in kept] for i, n in enumerate(named.categorical)},
        texts=[r.text for r in kept],
        splits=np.array([r.split for r in kept]),
        classes=classes,
        labels=_labels(kept, classes, several=len(targets) > 1, regressed=regressed),
        bad=bad,
    )


def _check_roles(roles: Roles, rows: Rows, split_by: str | None) -> None:
    """Every column is there, and in one role."""
    uses = [
        *((name, "target") for name in roles.targets),
        *((n, role) for role in ("numeric", "categorical", "text") for n in getattr(roles, role)),
        *([(split_by, "split_by")] if split_by else []),
    ]
    seen: dict[str, str] = {}
    for name, role in uses:
        rows.column(name)
        if name in seen:
            raise UserError(f"the column {name!r} is named as {seen[name]} and as {role}: once.")
        seen[name] = role
    if not (roles.numeric or roles.categorical or roles.text):
        raise UserError("the table has no column but its target: there is nothing to predict from.")


class _Parser:
    """Rows of one table, cell by cell."""

    def __init__(
        self,
        table: Rows,
        roles: Roles,
        regressed: bool,
        missing: Policy,
        marks: frozenset[str],
        split_by: str | None,
    ) -> None:
        def at(names: Sequence[str]) -> list[tuple[str, int]]:
            return [(name, table.column(name)) for name in names]

        self.numeric, self.categorical = at(roles.numeric), at(roles.categorical)
        self.text, self.targets = at(roles.text), at(roles.targets)
        self.regressed, self.missing, self.marks = regressed, missing, marks
        self.split = None if split_by is None else table.column(split_by)

    def row(self, cells: Sequence[str], place: tuple[str, int]) -> _Row:
        numbers = [self.number(name, cells[i].strip(), place) for name, i in self.numeric]
        targets = [cells[i].strip() for _, i in self.targets]
        for (name, _), target in zip(self.targets, targets, strict=True):
            if target in self.marks:
                raise _Unreadable(f"no {name}")
            if self.regressed:
                numbers.append(_number(name, target))
            elif len(targets) > 1 and target.lower() not in _HOLDS:
                raise _Unreadable(f"{name} is neither 0 nor 1: {target!r}")
        found = [cells[i].strip() for _, i in self.categorical]
        text = "\n".join(cells[i] for _, i in self.text)
        if not text.strip() and not (self.numeric or self.categorical):
            raise _Unreadable("no text")
        split = "" if self.split is None else cells[self.split].strip()
        if self.split is not None and not split:
            raise _Unreadable("no split")
        return _Row(
            numbers=tuple(numbers),
            cells=tuple("" if cell in self.marks else cell for cell in found),
            text=text,
            targets=tuple(targets),
            split=split,
        )

    def number(self, name: str, cell: str, place: tuple[str, int]) -> float:
        if cell not in self.marks:
            return _number(name, cell)
        if self.missing == "refuse":
            raise UserError(
                f"{place[0]}, line {place[1]}: {name} is missing, and missing='refuse'. Mend the "
                "table, or set missing to 'impute' or 'quarantine'."
            )
        if self.missing == "quarantine":
            raise _Unreadable(f"{name} is missing")
        return float("nan")


def _number(name: str, cell: str) -> float:
    try:
        return number(cell)
    except ValueError:
        raise _Unreadable(f"{name} is no number: {cell[:40]!r}") from None


def _hashed(cells: Sequence[str], seed: int, valid_fraction: float) -> str:
    """The split of a row: a function of its cells, so that equal rows are never in both."""
    text = json.dumps([seed, *cells])
    digest = hashlib.sha256(text.encode()).digest()
    return "valid" if int.from_bytes(digest[:8]) < valid_fraction * 2**64 else "train"


def _classes(
    rows: Sequence[_Row],
    labels: Sequence[str],
    *,
    several: bool,
    regressed: bool,
    targets: Sequence[str],
) -> tuple[str, ...]:
    if regressed:
        return ()
    if several:
        return tuple(targets)
    trained = {row.targets[0] for row in rows if row.split == "train"}
    classes = tuple(labels) or tuple(sorted(trained))
    there = sorted(trained & set(classes))
    if rows and len(there) < 2:
        what = f"one class only, {there[0]!r}" if there else f"none of the labels {list(classes)}"
        raise UserError(
            f"the training split has {what} in {targets[0]!r}: there is nothing to tell apart."
        )
    return classes


def _labels(
    rows: Sequence[_Row], classes: tuple[str, ...], *, several: bool, regressed: bool
) -> np.ndarray:
    if regressed:
        return np.zeros(0, np.int32)
    if several:
        return np.array([[_HOLDS[t.lower()] for t in row.targets] for row in rows], np.float32)
    numbers = {name: i for i, name in enumerate(classes)}
    return np.array([numbers[row.targets[0]] for row in rows], np.int32)


def _tell(bad: Sequence[Bad], kept: int, name: str, max_quarantined: float) -> None:
    """Logs and writes what was left out; raises UserError where it is too much."""
    if not bad:
        if not kept:
            raise UserError(f"{name}: an empty table.")
        return
    reasons = Counter(b.reason.partition(":")[0] for b in bad)
    counted = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(8))
    first = bad[0]
    lines = "".join(json.dumps(dataclasses.asdict(b), ensure_ascii=False) + "\n" for b in bad)
    digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
    path = cache_folder() / "quarantine" / f"{digest}.jsonl"
    write_atomically(path, lambda made: made.write_text(lines, "utf-8"))
    told = (
        f"{name}: {len(bad)} of {kept + len(bad)} rows are left out ({counted}), first "
        f"{first.file}, line {first.line}: {first.reason}. All of them: {path}"
    )
    if not kept or len(bad) > max_quarantined * (kept + len(bad)):
        raise UserError(f"{told}. Mend them, or raise max_quarantined.")
    log.warning("%s", told)
