"""The rows of tables in files: CSV and Parquet, with what cannot be read told by file and line."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmjax.errors import UserError, did_you_mean

_LONGEST_CELL = 2**27  # characters; csv's own limit of 128 Ki is less than a long letter
_SHOWN = 80  # characters of a bad row


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A row that is left out: the file, its line (or record) from 1, why, and its beginning."""

    file: str
    line: int
    reason: str
    row: str


@dataclass(kw_only=True)
class Rows:
    """Rows of text cells in the order of `header`, where each came from, and those left out."""

    header: list[str]
    cells: list[list[str]] = field(default_factory=list)
    where: list[tuple[str, int]] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)

    def add(self, cells: list[str], file: str, line: int) -> None:
        """A row that could be read."""
        self.cells.append(cells)
        self.where.append((file, line))

    def reject(self, cells: Sequence[str], file: str, line: int, reason: str) -> None:
        """A row that could not."""
        row = ",".join(cells)[:_SHOWN].encode("utf-8", "replace").decode()
        self.bad.append(Bad(file=file, line=line, reason=reason, row=row))

    def column(self, name: str) -> int:
        """The column of this name; raises UserError where there is none."""
        if name not in self.header:
            raise UserError(f"the table has no column {name!r}." + did_you_mean(name, self.header))
        return self.header.index(name)


def read_rows(files: Sequence[Path], *, delimiter: str = ",") -> Rows:
    """Reads tables of one set of columns, each file with a header, in the order of the files.

    Files ending in .parquet are read by pyarrow, all others as CSV in UTF-8, .gz decompressed; in
    CSV quotes are doubled within quotes. A row with another number of cells than the header, with
    bytes that are no UTF-8 or with a broken quote is left out (`Rows.bad`). Columns are put in
    the order of the first file.

    Raises UserError for a file without header or rows, a name that stands twice, a missing column.
    """
    if len(delimiter) != 1:
        raise UserError(f"delimiter is {delimiter!r}: give one character, as ',' or '\\t'.")
    rows: Rows | None = None
    for file in files:
        read = _parquet(file) if file.suffix == ".parquet" else _csv(file, delimiter)
        rows = _joined(rows, read)
    if rows is None or not (rows.cells or rows.bad):
        names = ", ".join(str(file) for file in files[:3])
        raise UserError(f"{names}: an empty table: give one with at least a row below its header.")
    return rows


def rows_of(
    header: Sequence[str], cells: Iterable[Sequence[str]], *, name: str, first: int = 2
) -> Rows:
    """A table that is no file of text; its rows are counted from `first`."""
    rows = Rows(header=list(header))
    for line, row in enumerate(cells, start=first):
        rows.add(list(row), name, line)
    return rows


def _joined(rows: Rows | None, more: Rows) -> Rows:
    if rows is None:
        return more
    order = [more.column(name) for name in rows.header]
    rows.cells += [[row[i] for i in order] for row in more.cells]
    rows.where += more.where
    rows.bad += more.bad
    return rows


def _checked_header(header: Sequence[str], file: Path) -> list[str]:
    names = [name.strip() for name in header]
    if not any(names):
        raise UserError(f"{file}: an empty table: its first line must name the columns.")
    for name in names:
        if not name or names.count(name) > 1:
            what = f"the column {name!r} twice" if name else "a column without a name"
            raise UserError(f"{file}: its first line names {what}: give each column its own name.")
    return names


def _csv(file: Path, delimiter: str) -> Rows:
    try:
        with _opened(file) as text:
            return _parsed(text, file, delimiter)
    except (OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error


def _opened(file: Path) -> io.TextIOBase:
    how = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    if file.suffix == ".gz":
        # No overload is found for arguments in a dict.
        return gzip.open(file, "rt", **how)  # type: ignore[call-overload]
    return file.open("r", **how)  # type: ignore[call-overload]  # likewise


def _parsed(text: io.TextIOBase, file: Path, delimiter: str) -> Rows:
    found = csv_records(text, delimiter=delimiter, strict=True)
    line, header = next(found, (0, []))
    if isinstance(header, str):
        raise UserError(f"{file}: its first line, which must name the columns: {header}.")
    rows = Rows(header=_checked_header(header, file))
    for line, cells in found:
        if isinstance(cells, str):
            rows.reject([], str(file), line, cells)
        elif len(cells) != len(rows.header):
            reason = f"{len(cells)} cells, and the table has {len(rows.header)} columns"
            rows.reject(cells, str(file), line, reason)
        elif any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
            rows.reject(cells, str(file), line, "no UTF-8")
        else:
            rows.add(cells, str(file), line)
    return rows


def csv_records(
    text: Iterable[str],
    *,
    delimiter: str = ",",
    strict: bool = False,
    quoted: bool = True,
) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, the cells or why there are none) of each row of CSV that is not blank.

    Args:
      text: a file that is open with newline="", or lines with their ends.
      delimiter: between cells.
      strict: whether a quote in a wrong place makes a row bad.
      quoted: whether cells may stand in quotes; else a quote is a letter like others.
    """
    reader = csv.reader(
        text,
        delimiter=delimiter,
        strict=strict,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    line = 1
    while (cells := _next(reader)) is not None:
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _next(reader: Iterator[list[str]]) -> list[str] | str | None:
    limit = csv.field_size_limit(_LONGEST_CELL)  # of the whole process: not for long
    try:
        return next(reader, None)
    except csv.Error as error:
        return f"broken: {error}"
    finally:
        csv.field_size_limit(limit)


def _parquet(file: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    columns = [table.column(i).to_pylist() for i in range(table.num_columns)]
    cells = (["" if x is None else str(x) for x in row] for row in zip(*columns, strict=True))
    return rows_of(_checked_header(table.column_names, file), cells, name=str(file), first=1)
