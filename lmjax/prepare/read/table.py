"""Tables: parquet, and text with separated columns."""

from __future__ import annotations

import csv
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from lmjax.prepare.files import File
from lmjax.prepare.read.decode import Undecodable, decode
from lmjax.prepare.read.jsonl import add_record
from lmjax.prepare.read.sheet import Piece, Sheet
from lmjax.prepare.read.text import lines_of

_ROWS = 1024
LONGEST_ROW = 1 << 24  # bytes; where a quote is open for longer, it was none
LONGEST_CELL = 1 << 27  # characters


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """A row is a record, one of whose columns is the text.

    Attributes:
      text: the column that holds the text.
      keep: which of the other columns go into `meta`; () for all.
    """

    text: str = "text"
    keep: Sequence[str] = ()

    def cut(self, file: File, *, target: int) -> Sequence[Piece]:
        """Runs of row groups of about `target` bytes."""
        pieces: list[Piece] = []
        try:
            with file.open() as raw:
                told = pq.ParquetFile(raw).metadata
                begin = first = rows = size = 0
                for i in range(told.num_row_groups):
                    group = told.row_group(i)
                    rows, size = rows + group.num_rows, size + group.total_byte_size
                    if size >= target or i + 1 == told.num_row_groups:
                        pieces.append(Piece(file=file, begin=begin, end=i + 1, first=first))
                        begin, first, size = i + 1, rows, 0
        except (pa.ArrowException, OSError):
            return [Piece(file=file)]  # whose reading says what is wrong
        return pieces or [Piece(file=file)]

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads row groups; one that is damaged is quarantined whole. Offsets are row numbers."""
        with piece.file.open() as raw:
            try:
                table = pq.ParquetFile(raw)
            except (pa.ArrowException, OSError) as error:
                sheet.bad(piece.first, 0, f"no parquet: {_first_line(error)}", b"")
                return
            names = table.schema_arrow.names
            wanted = [n for n in names if n == self.text or n in self.keep or not self.keep]
            number = piece.first
            end = table.metadata.num_row_groups if piece.end < 0 else piece.end
            for group in range(piece.begin, end):
                last = number + table.metadata.row_group(group).num_rows
                try:
                    for batch in table.iter_batches(_ROWS, row_groups=[group], columns=wanted):
                        for record in batch.to_pylist():
                            raw_text = str(record.get(self.text))
                            add_record(sheet, number, number, record, self.text, (), raw=raw_text)
                            number += 1
                        yield
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    why = "a damaged row group, whose rows from here on are lost: "
                    sheet.counts["rows lost in damaged row groups"] += last - number
                    sheet.bad(number, number, why + _first_line(error), b"")
                number = last


@dataclass(frozen=True, kw_only=True)
class Csv:
    """A row is a record, one of whose columns is the text; the first row names the columns.

    A row with too few or too many cells is quarantined, and so is a cell that no quote ends. Cells
    may hold line breaks within quotes. A second column of one name, "n", is "n.2".

    Attributes:
      text: the column that holds the text.
      keep: which of the other columns go into `meta`; () for all.
      delimiter: what parts the cells; "" for a tab in a file that ends in .tsv, else a comma.
      names: the columns' names, where the file's first row is a record already.
    """

    text: str = "text"
    keep: Sequence[str] = ()
    delimiter: str = ""
    names: Sequence[str] = ()

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads a file row by row; where rows cannot be told apart, the next line begins one."""
        csv.field_size_limit(LONGEST_CELL)
        delimiter = self.delimiter or ("\t" if ".tsv" in piece.file.name.lower() else ",")
        names, number = list(self.names), 0
        for offset, text, cells, reason in _rows(piece, sheet, delimiter):
            if not names and not reason:
                names = _distinct(cells)
                continue
            if not reason and len(cells) != len(names):
                reason = f"{len(cells)} cells where there are {len(names)} columns"
            if reason:
                sheet.bad(number, offset, reason, text)
            else:
                record = dict(zip(names, cells, strict=True))
                add_record(sheet, number, offset, record, self.text, self.keep, raw=text)
            number += 1
            yield


def _rows(
    piece: Piece, sheet: Sheet, delimiter: str
) -> Iterator[tuple[int, bytes, list[str], str]]:
    """Yields (offset, bytes, cells, reason) of each row; a reason where it has no cells."""
    feed = _Feed((offset, line) for _, offset, line in lines_of(piece, sheet))
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        feed.begin_row()
        reason, cells = "", []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, Undecodable) as error:
            open_ = "unexpected end" in str(error)
            reason = "a quote that nothing ends" if open_ else f"no row of cells: {error}"
            feed.keep_first()  # its own line alone is lost
        offset, data = feed.row()
        if not reason:
            sheet.counts.update(feed.repairs)
        if cells or reason:
            yield offset, data, cells, reason


def _distinct(names: Sequence[str]) -> list[str]:
    """The names of columns; the second "n" is "n.2", so that no cell is lost."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return out


class _Feed:
    """Lines as csv.reader wants them; those of the row at hand can be given back."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        self.repairs: list[str] = []
        self._lines, self._size = lines, 0
        self._taken: list[tuple[int, bytes]] = []
        self._ahead: deque[tuple[int, bytes]] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next line, while the row is not too long to be one."""
        found = self._ahead.popleft() if self._ahead else next(self._lines, None)
        if found is None or self._size > LONGEST_ROW:
            if found is not None:
                self._ahead.appendleft(found)
            raise StopIteration
        self._taken.append(found)
        self._size += len(found[1])
        text, how = decode(found[1])
        if how:
            self.repairs.append(how)
        return f"{text}\n"

    def begin_row(self) -> None:
        """What follows is another row."""
        self._taken, self.repairs, self._size = [], [], 0

    def keep_first(self) -> None:
        """Gives back all lines of the row but the first."""
        self._ahead.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]

    def row(self) -> tuple[int, bytes]:
        """Where the row begins, and its bytes."""
        return self._taken[0][0], b"\n".join(line for _, line in self._taken)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
