"""Pairs of texts: read from files, the bad ones set aside, and split so that none straddles.

"numbers" is a corpus made by code: numbers in digits, and in English words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmjax.data.quarantine import Bad, beginning
from lmjax.data.rows import csv_records
from lmjax.data.source import find_files, text_of_file
from lmjax.errors import UserError, did_you_mean

NUMBERS = "numbers"
_TABLES = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A text and its translation; pairs of one document stay in one split.

    Args:
      name: where it stands, `path:line`.
    """

    source: str
    target: str
    document: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The two halves of a corpus.

    Args:
      train, valid: pairs in the order in which they were read.
      refused: rows that are no pair.
      counts: how many were read, refused by reason, and left out by reason.
    """

    train: Sequence[Pair]
    valid: Sequence[Pair]
    refused: Sequence[Bad]
    counts: Mapping[str, int] = field(default_factory=dict)


def read_pairs(
    path: str,
    *,
    target_path: str = "",
    source_field: str = "source",
    target_field: str = "target",
    document_field: str = "",
) -> tuple[list[Pair], list[Bad]]:
    """Every pair of a corpus, in an order that depends on names alone, and what is no pair.

    Args:
      path: "numbers", or a file, folder or glob of .jsonl, .tsv and .csv (each may be .gz); tables
        have a first row of names. With `target_path`, texts by line.
      target_path: texts by line, line n the translation of line n of `path`.
      source_field, target_field: names of the fields, or columns, of a pair's two sides.
      document_field: the field that names the document a pair stands in. Without one, and in texts
        by line, each source text is a document of its own.

    Raises:
      UserError: for files that cannot be read, columns or fields that are not there, and texts by
        line of unequal numbers.
    """
    if path == NUMBERS:
        return list(_numbers()), []
    rows: Iterator[tuple[str, tuple[str, ...] | Bad]]
    if target_path:
        rows = _aligned(path, target_path)
    else:
        names = (source_field, target_field, *([document_field] if document_field else []))
        rows = (row for file in find_files(path) for row in _rows(file, names))
    pairs: list[Pair] = []
    refused: list[Bad] = []
    for name, found in rows:
        if isinstance(found, Bad):
            refused.append(found)
            continue
        source, target, *document = found
        source, target = " ".join(source.split()), " ".join(target.split())
        if not source or not target:
            side = "target" if source else "source"
            refused.append(Bad(name, f"empty {side}", beginning(source or target)))
            continue
        document_name = document[0] if document else source
        pairs.append(Pair(source=source, target=target, document=document_name, name=name))
    return pairs, refused


def split_pairs(pairs: Sequence[Pair], refused: Sequence[Bad], *, fraction: float) -> Pairs:
    """Parts pairs by the hash of their document, the same way for every seed.

    A document is held out where its hash, as a number from 0 to 1, is below `fraction`. A pair that
    stands in a split before is left out of it, and so is one of the training split whose source or
    target is a held-out pair's: letter by letter but for case.
    """
    halves: dict[bool, list[Pair]] = {True: [], False: []}
    counts = Counter(f"refused: {one.reason}" for one in refused)
    for pair in pairs:
        halves[_share(pair.document) < fraction].append(pair)
    valid, again = _unique(halves[True])
    counts["left out: there before"] += again
    sides = [{_key(getattr(pair, side)) for pair in valid} for side in ("source", "target")]
    apart = [
        pair
        for pair in halves[False]
        if _key(pair.source) not in sides[0] and _key(pair.target) not in sides[1]
    ]
    counts["left out: held out in another document"] += len(halves[False]) - len(apart)
    train, again = _unique(apart)
    counts["left out: there before"] += again
    counts |= {"train": len(train), "valid": len(valid)}
    return Pairs(train=train, valid=valid, refused=refused, counts=dict(counts))


def reversed_pair(pair: Pair) -> Pair:
    """The same pair, the other way round."""
    return dataclasses.replace(pair, source=pair.target, target=pair.source)


def _unique(pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
    """The first of every pair, and how many are left out."""
    first = {(_key(pair.source), _key(pair.target)): pair for pair in reversed(pairs)}
    kept = [pair for pair in pairs if first[_key(pair.source), _key(pair.target)] is pair]
    return kept, len(pairs) - len(kept)


def _key(text: str) -> str:
    return text.casefold()


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _aligned(path: str, target_path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    sides = [[(f, n) for f in find_files(one)] for n, one in enumerate((path, target_path))]
    lines = [[x for f, _ in side for x in _lines(f)] for side in sides]
    if len(lines[0]) != len(lines[1]):
        raise UserError(
            f"{path} has {len(lines[0])} lines and {target_path} {len(lines[1])}: line n of the "
            "second must be the translation of line n of the first."
        )
    for (name, source), (_, target) in zip(*lines, strict=True):
        yield name, (source, target)


def _lines(file: Path) -> list[tuple[str, str]]:
    lines = text_of_file(file).split("\n")
    if not lines[-1]:
        lines.pop()
    return [(f"{file}:{number}", line) for number, line in enumerate(lines, start=1)]


def _rows(file: Path, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...] | Bad]]:
    """The fields of these names of every row, or why it has none."""
    kind = next((s for s in map(str.lower, reversed(file.suffixes)) if s != ".gz"), "")
    if kind == ".jsonl":
        yield from _json_rows(file, names)
    elif kind in _TABLES:
        yield from _table_rows(file, names, _TABLES[kind])
    else:
        raise UserError(
            f"{file} is neither .jsonl nor .tsv nor .csv: give pairs in one of these, or a second "
            "file of lines as target_path."
        )


def _json_rows(file: Path, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...] | Bad]]:
    for name, line in _lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            reason = "" if isinstance(record, dict) else "no JSON object"
        except (ValueError, RecursionError):
            record, reason = {}, "no JSON"
        if not reason and (missing := [x for x in names if not isinstance(record.get(x), str)]):
            if missing[0] not in record and not _known(file, missing[0]):
                raise UserError(
                    f"{name} has no field {missing[0]!r}, nor has any other line of the file."
                    + did_you_mean(missing[0], record)
                )
            reason = f"no text in {missing[0]!r}"
        if reason:
            yield name, Bad(name, reason, beginning(line))
        else:
            yield name, tuple(record[x] for x in names)


def _known(file: Path, name: str) -> bool:
    """Whether any line names the field."""
    return json.dumps(name) in text_of_file(file)


def _table_rows(
    file: Path, names: tuple[str, ...], delimiter: str
) -> Iterator[tuple[str, tuple[str, ...] | Bad]]:
    text = io.StringIO(text_of_file(file).removeprefix("\ufeff"), newline="")
    rows = csv_records(text, delimiter=delimiter, quoted=delimiter == ",")
    _, header = next(rows, (1, []))
    if isinstance(header, str):
        raise UserError(f"{file}: its first row, which must name the columns: {header}.")
    if missing := [x for x in names if x not in header]:
        raise UserError(
            f"{file} has no column {missing[0]!r} in its first row, which names them."
            + did_you_mean(missing[0], header)
        )
    columns = [header.index(x) for x in names]
    for line, row in rows:
        name = f"{file}:{line}"
        if isinstance(row, str):
            yield name, Bad(name, row, "")
        elif len(row) != len(header):
            reason = f"{len(row)} cells under {len(header)} names"
            yield name, Bad(name, reason, beginning(delimiter.join(row)))
        else:
            yield name, tuple(row[column] for column in columns)


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    "ninety"
)
_NAMED = _WORDS.split(" ")  # 0 to 20, and then the tens


def _numbers() -> Iterator[Pair]:
    """4,000 numbers below a million, drawn once and for all."""
    for index in range(4000):
        number = int(_share(f"number {index}") * 10 ** (1 + index % 6))
        yield Pair(
            source=str(number), target=_words(number), document=str(number), name=f"numbers:{index}"
        )


def _words(number: int) -> str:
    if number < 20:
        return _NAMED[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _NAMED[18 + tens] + (f"-{_NAMED[ones]}" if ones else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    head, rest = divmod(number, size)
    between = "" if not rest else " and " if rest < 100 else " "
    return f"{_words(head)} {name}{between}{_words(rest) if rest else ''}"
