"""Texts with labels out of files: tables, jsonl, folders by class, files by class."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lmjax.data.quarantine import Bad, beginning, counted
from lmjax.data.rows import csv_records
from lmjax.data.source import find_files
from lmjax.errors import UserError, did_you_mean

MADE = "made"
LabelFrom = Literal["field", "folder", "file"]
_TABLES = {".csv": ",", ".tsv": "\t"}


class Row(NamedTuple):
    """One text with its label; `name` is its file and line, `part` what `split_field` says."""

    name: str
    text: str
    label: str
    part: str = ""


def read_rows(
    path: str,
    *,
    label_from: LabelFrom = "field",
    text_field: str = "text",
    label_field: str = "label",
    split_field: str = "",
    encoding: str = "utf-8",
) -> tuple[list[Row], list[Bad]]:
    """Reads every row, (good ones, bad ones), in an order that depends on names alone.

    Args:
      path: a file, a folder or a glob; "package:NAME/PATH" for the files of an installed package,
        which is not imported; "made" for small ones that need no file (`made`).
      label_from: "field": of .jsonl, .csv and .tsv, whose first row names the columns. "folder":
        each file is a text, and its folder's name the label. "file": each line is a text, and its
        file's name, without the ending, the label.
      text_field: the column of the text.
      label_field: the column of the label.
      split_field: the column that says which split a row belongs to; "" for none.
      encoding: of the files' bytes.

    Raises:
      UserError: where there is no such file, no such column, or no good row.
    """
    if path == MADE:
        return made(), []
    fields = (text_field, label_field, *([split_field] if split_field else ()))
    good: list[Row] = []
    bad: list[Bad] = []
    for file in find_files(path):
        try:
            text = file.read_bytes().decode(encoding, "surrogateescape").removeprefix("\ufeff")
        except (OSError, LookupError, UnicodeError) as error:
            raise UserError(f"{file} cannot be read as {encoding}: {error}.") from error
        if label_from == "folder":
            records: Iterator[tuple[str, Any]] = iter([(str(file), (text, file.parent.name, ""))])
        elif label_from == "file":
            lines = enumerate(text.split("\n"), start=1)
            records = ((f"{file}:{n}", (line, file.stem, "")) for n, line in lines if line.strip())
        else:
            records = _records(file, text, fields)
        for name, found in records:
            if isinstance(found, Bad):
                bad.append(found)
                continue
            row = Row(name, *found)
            reason = _wrong(row, encoding)
            if reason:
                shown = beginning(row.text)
                bad.append(Bad(name, reason, shown))
            else:
                good.append(row)
    if not good:
        raise UserError(f"{path} holds no row with a text and a label ({counted(bad)}).")
    return good, bad


def made() -> list[Row]:
    """A few hundred short reviews made of templates, with two labels: for trying things out."""
    words = {
        "positive": ("good", "great", "wonderful", "lovely", "excellent", "brilliant"),
        "negative": ("bad", "awful", "terrible", "dull", "dreadful", "boring"),
    }
    things = ("film", "book", "service", "hotel", "flight", "song", "meal", "game")
    shapes = ("The {t} was {w}.", "What a {w} {t}!", "I found this {t} {w}, and so did we all.")
    return [
        Row(f"{MADE}:{label}", shape.format(t=thing, w=word), label)
        for shape in shapes
        for thing in things
        for label, some in words.items()
        for word in some
    ]


def _records(
    file: Path, text: str, fields: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...] | Bad]]:
    """(name, the fields as text, or what is bad) of each row of a table or of jsonl."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        yield from _objects(file, text, fields)
    elif suffix in _TABLES:
        yield from _cells(file, text, fields, _TABLES[suffix])
    else:
        raise UserError(
            f"{file}: labels lie in the fields of .jsonl, .csv or .tsv. Set label_from='folder' "
            "where folders are named by class, or 'file' where files are, a text in each line."
        )


def _objects(
    file: Path, text: str, fields: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...] | Bad]]:
    known: set[str] = set()
    seen = False
    for number, line in enumerate(text.split("\n"), start=1):
        name = f"{file}:{number}"
        if not line.strip():
            continue
        shown = beginning(line)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            yield name, Bad(name, "no JSON object", shown)
            continue
        known |= record.keys()
        seen = seen or all(field in record for field in fields)
        yield name, _of(record, fields)
    if known and not seen:
        _check_fields(file, fields, known)


def _cells(
    file: Path, text: str, fields: Sequence[str], delimiter: str
) -> Iterator[tuple[str, tuple[str, ...] | Bad]]:
    columns: list[str] = []
    for line, cells in csv_records(io.StringIO(text, newline=""), delimiter=delimiter):
        name = f"{file}:{line}"
        if isinstance(cells, str):
            yield name, Bad(name, cells, "")
        elif not columns:
            columns = [cell.strip() for cell in cells]
            _check_fields(file, fields, columns)
        elif len(cells) != len(columns):
            shown = beginning(delimiter.join(cells))
            yield name, Bad(name, "another number of cells than of columns", shown)
        else:
            yield name, _of(dict(zip(columns, cells, strict=True)), fields)


def _check_fields(file: Path, fields: Sequence[str], columns: Any) -> None:
    for kind, field in zip(("text_field", "label_field", "split_field"), fields, strict=False):
        if field not in columns:
            hint = did_you_mean(field, columns)
            raise UserError(f"{file} has no column {field!r}: set {kind}.{hint}")


def _of(record: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    """(text, label, part): what is no text is written as JSON writes it, what lacks is empty."""
    found = [record.get(field) for field in fields]
    texts = ["" if x is None else x if isinstance(x, str) else json.dumps(x) for x in found]
    return texts[0], texts[1].strip(), texts[2].strip() if len(texts) > 2 else ""


def _wrong(row: Row, encoding: str) -> str:
    """Why a row cannot be used; "" where it can."""
    try:
        "".join(row[1:]).encode()
    except UnicodeEncodeError:
        return f"not {encoding}"
    if not row.text.strip():
        return "no text"
    return "" if row.label else "no label"
