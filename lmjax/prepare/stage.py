"""What a stage is: a pure function from a table of records to what becomes of each of them.

A stage is a frozen dataclass: its fields are its config, it pickles, and it names no engine. A
`Stage` sees one shard of records and nothing else. A `Keyed` must see records that are far apart
together (duplicates, say): it gives each record keys, and gets back all rows of equal key.

A stage never reorders records, and makes none; all it may do is change, drop or quarantine them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

# A record. Its id is "SOURCE/relative/path#number", the number counted in its file from 0; `meta`
# is a JSON object of every other field that it came with, or "". Stages add columns after these.
RECORD = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("text", pa.large_string()),
        pa.field("source", pa.string()),
        pa.field("meta", pa.string()),
    ]
)
DROPPED = pa.schema([(name, pa.string()) for name in ("id", "reason", "detail")])
# `offset` is where the record begins in its (decompressed) file, in bytes; `raw` is its beginning.
QUARANTINED = pa.schema(
    [
        ("id", pa.string()),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)
RAW_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of the records of one shard: each is kept, dropped or quarantined.

    Attributes:
      kept: the records that go on, in their order, with `RECORD`'s columns and others after them.
      dropped: `DROPPED`: records left out on purpose. `detail` is for people: a score, a kept id.
      quarantined: `QUARANTINED`: records that could not be read or handled.
      counts: further numbers for the report: {"e-mail addresses replaced": 12}.
    """

    kept: pa.Table
    dropped: pa.Table = field(default_factory=DROPPED.empty_table)
    quarantined: pa.Table = field(default_factory=QUARANTINED.empty_table)
    counts: Mapping[str, int] = field(default_factory=dict)


def judged(
    records: pa.Table,
    reasons: Sequence[str | None],
    *,
    details: Sequence[str | None] | None = None,
    counts: Mapping[str, int] | None = None,
) -> Result:
    """Keeps the records whose reason is None (or ""), and drops the others for their reason.

    Args:
      records: the records as they go on, every row: texts may be changed and columns added.
      reasons: one a record, in their order; a list or an array of strings.
      details: one a record, of which those of dropped records are stored.
      counts: further numbers for the report.
    """
    why = _strings(reasons)
    what = pa.nulls(len(why), pa.string()) if details is None else _strings(details)
    assert len(records) == len(why) == len(what), (len(records), len(why), len(what))
    out = pc.fill_null(pc.not_equal(why, ""), False)
    dropped = pa.table(
        [records["id"].filter(out), why.filter(out), pc.fill_null(what.filter(out), "")],
        schema=DROPPED,
    )
    kept = records.filter(pc.invert(out)) if len(dropped) else records
    return Result(kept=kept, dropped=dropped, counts=counts or {})


def set_aside(
    result: Result, records: pa.Table, reasons: Mapping[str, str], *, file: str = ""
) -> Result:
    """Moves kept records to quarantine: those whose id `reasons` maps to a reason.

    Args:
      result: what the stage would do with its records otherwise.
      records: the records as the stage got them, whose texts are stored as `raw`.
      reasons: id to reason, for records that could not be handled.
      file: what failed on them, where that is not the record's own file (an endpoint's address).
    """
    bad = pc.is_in(records["id"], pa.array(list(reasons), pa.string()))
    rows = [
        {"id": name, "file": file, "offset": -1, "reason": reasons[name], "raw": beginning(text)}
        for name, text in zip(
            records["id"].filter(bad).to_pylist(),
            records["text"].filter(bad).to_pylist(),
            strict=True,
        )
    ]
    kept = result.kept.filter(
        pc.invert(pc.is_in(result.kept["id"], pa.array(list(reasons), pa.string())))
    )
    dropped = result.dropped.filter(
        pc.invert(pc.is_in(result.dropped["id"], pa.array(list(reasons), pa.string())))
    )
    return Result(
        kept=kept,
        dropped=dropped,
        quarantined=pa.concat_tables(
            [result.quarantined, pa.Table.from_pylist(rows, schema=QUARANTINED)]
        ),
        counts=result.counts,
    )


def beginning(raw: bytes | str | None) -> str:
    """The first bytes of a record as text that any file can hold: what quarantine shows of it."""
    data = (raw or "").encode(errors="replace")[:RAW_BYTES] if not isinstance(raw, bytes) else raw
    return data[:RAW_BYTES].decode(errors="replace")


def with_column(records: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Sets a column: in its place where there is one of this name, else after all others."""
    at = records.schema.get_field_index(name)
    if at < 0:
        return records.append_column(name, values)
    return records.set_column(at, name, values)


class Stage(Protocol):
    """A stage that judges each shard by itself."""

    def __call__(self, records: pa.Table) -> Result:
        """Every record of `records` kept (changed or not), dropped or quarantined."""


@runtime_checkable
class Keyed(Protocol):
    """A stage that must see records of equal key together, wherever they lie.

    Tables of keys and of decisions are exchanged between shards. Both carry the columns `id` and
    `order` of the record that a row speaks of; `order` is its place among all records (int64,
    growing, with gaps), set by the framework before `keys` is called.
    """

    def keys(self, records: pa.Table) -> pa.Table:
        """Rows to be brought together: `key` (uint64 or binary), `id`, `order`, then any others.

        A record may have any number of rows, in any order. `records` has the column `order`.
        """

    def reduce(self, rows: pa.Table) -> pa.Table:
        """Decisions from all rows of some whole keys, sorted by (key, order).

        A decision has `id` and `order` of the record that it is for, then any columns; a record may
        get many, from several keys. Rows that ask for nothing need no decision.
        """

    def decide(self, records: pa.Table, decisions: pa.Table) -> Result:
        """Judges a shard, given all decisions for its records, sorted by order."""


@runtime_checkable
class Verified(Keyed, Protocol):
    """A keyed stage whose first decisions are candidates, and need a second exchange.

    Of the records that are candidates alone, evidence that is too large to send for every record
    (a document's shingles, say) is brought together under a key that the candidates share.
    """

    def evidence(self, records: pa.Table, decisions: pa.Table) -> pa.Table:
        """As `keys`, given what `reduce` decided for these records."""

    def verify(self, rows: pa.Table) -> pa.Table:
        """As `reduce`, of the evidence; its decisions replace those of `reduce`."""


@runtime_checkable
class Settled(Protocol):
    """A keyed stage that looks at all decisions at once before any record is judged."""

    def settle(self, decisions: pa.Table) -> pa.Table:
        """All decisions, sorted by order, to decisions: union-find over pairs, say."""


@runtime_checkable
class Reading(Protocol):
    """A stage that reads files of its own: their contents count as its input."""

    def files(self) -> Sequence[str]:
        """Paths of the files."""


def _strings(values: Sequence[str | None]) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.cast(pa.string())
    return pa.array(values, pa.string())
