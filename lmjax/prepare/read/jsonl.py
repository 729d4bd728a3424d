"""JSON, one object a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from lmjax.prepare.files import File
from lmjax.prepare.read.decode import Undecodable, decode
from lmjax.prepare.read.sheet import Piece, Sheet, to_meta
from lmjax.prepare.read.text import cut_at_lines, lines_of


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """A line is a JSON object, one of whose fields is the text; blank lines are no records.

    Attributes:
      text: the field that holds the text.
      keep: which of the other fields go into `meta`; () for all.
    """

    text: str = "text"
    keep: Sequence[str] = ()

    def cut(self, file: File, *, target: int) -> Sequence[Piece]:
        """Parts of about `target` bytes, if the file is not compressed."""
        return cut_at_lines(file, target=target)

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads the lines that begin in a piece; a record's number is its line's."""
        loads = orjson.loads
        for number, offset, line in lines_of(piece, sheet):
            if not line or line.isspace():
                continue
            try:
                record = loads(line)
            except orjson.JSONDecodeError as error:
                record = _repaired(line, sheet)
                if record is None:
                    sheet.bad(number, offset, f"no JSON: {_short(error)}", line)
                    continue
            if not isinstance(record, dict):
                sheet.bad(number, offset, "no JSON object", line)
                continue
            add_record(sheet, number, offset, record, self.text, self.keep, raw=line)
            yield


def add_record(
    sheet: Sheet,
    number: int,
    offset: int,
    record: dict[str, Any],
    text_field: str,
    keep: Sequence[str],
    *,
    raw: bytes | str,
) -> None:
    """Adds a record with named fields; quarantined where its text is not there, or is no text."""
    if text_field not in record:
        sheet.bad(number, offset, f"no field {text_field!r}", raw)
        return
    text = record.pop(text_field)
    if not isinstance(text, str):
        sheet.bad(number, offset, f"{text_field!r} is {_kind(text)}, not text", raw)
        return
    if keep:
        record = {key: record[key] for key in keep if key in record}
    sheet.add(number, text, to_meta(record) if record else "")


def _repaired(line: bytes, sheet: Sheet) -> Any:
    """The line's object if all that is wrong with it is its encoding; None else."""
    try:
        text, how = decode(line)
        record = orjson.loads(text) if how or line.startswith(b"\xef\xbb\xbf") else None
    except (Undecodable, orjson.JSONDecodeError):
        return None
    if how and record is not None:
        sheet.counts[how] += 1
    return record


def _short(error: orjson.JSONDecodeError) -> str:
    """What is wrong, without where: so that equal mistakes are counted together."""
    return str(error.msg).split(":")[0]


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", dict: "an object", list: "an array"}
    return names.get(type(value), "a number")
