"""The folder of a stage: what became of each shard, written so that it is there whole or not.

    part-00000.parquet         records that go on
    dropped-00000.parquet      id, reason and detail of those left out, if any
    quarantined-00000.parquet  likewise of those that could not be handled
    counts-00000.json          the outcome: counts, and sizes and hashes of the above; written last

Each file appears whole (lmjax/data/folder.py). A shard whose outcome has the key that is
asked for is done: the key is a hash of the stage and of its input.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lmjax.data.folder import Folder
from lmjax.prepare.stage import DROPPED, QUARANTINED, Result

Outcome = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A table of records in a folder: its number among all shards, its file and that's sha256."""

    number: int
    folder: Folder
    name: str
    sha256: str

    def load(self) -> pa.Table:
        """The records."""
        if self.folder.is_remote:
            return pq.read_table(pa.BufferReader(self.folder.read(self.name)))
        return pq.read_table(self.folder.at(self.name))


@dataclass(frozen=True)
class Shelf:
    """The folder of one stage, and what identifies the stage."""

    folder: Folder
    key: str

    def outcome(self, number: int, key: str) -> Outcome | None:
        """What became of a shard, if that was written under this key and its files are there."""
        held = read_json(self.folder, f"counts-{number:05d}.json", key)
        try:
            files = [*held["parts"], *held["aside"].values()] if held else []
            whole = all(self.folder.size(file["name"]) == file["bytes"] for file in files)
        except (KeyError, TypeError, AttributeError):
            return None
        return held if whole else None

    def put(
        self,
        number: int,
        key: str,
        results: Iterable[Result],
        *,
        rows: int = -1,
        parts: list[dict[str, Any]] | None = None,
    ) -> Outcome:
        """Writes what became of a shard; returns its outcome.

        Args:
          number: the shard's.
          key: under which it will be found.
          results: one for each part: a shard that is read may be too large for one.
          rows: how many records went in; -1 where that is what came out, as of a reader.
          parts: files that hold what is kept, where it is not written as tables here.
        """
        as_tables = parts is None
        parts = parts or []
        dropped, quarantined = [], []
        counts: Counter[str] = Counter()
        sources: Counter[str] = Counter()
        kept = text_bytes = 0
        for index, result in enumerate(results):
            suffix = f"-{index:03d}" if index else ""
            if as_tables and (index == 0 or len(result.kept)):
                file = self._table(f"part-{number:05d}{suffix}.parquet", result.kept)
                parts.append({**file, "rows": len(result.kept)})
            dropped.append(result.dropped)
            quarantined.append(result.quarantined)
            counts.update(result.counts)
            kept += len(result.kept)
            text_bytes += _text_bytes(result.kept)
            told = pc.value_counts(result.kept["source"].combine_chunks()).to_pylist()
            sources.update({row["values"]: row["counts"] for row in told})
        aside = {
            name: pa.concat_tables([schema.empty_table(), *tables])
            for name, schema, tables in (
                ("dropped", DROPPED, dropped),
                ("quarantined", QUARANTINED, quarantined),
            )
        }
        out = sum(len(table) for table in aside.values())
        assert rows in (-1, kept + out), f"{rows} records went in, {kept} + {out} came out"
        outcome = {
            "key": key,
            "rows": kept + out,
            "kept": kept,
            "text_bytes": text_bytes,
            **{name: _by_reason(table) for name, table in aside.items()},
            "counts": dict(sorted(counts.items())),
            "sources": dict(sorted(sources.items())),
            "parts": parts,
            "aside": {
                name: self._table(f"{name}-{number:05d}.parquet", table)
                for name, table in aside.items()
                if len(table)
            },
        }
        write_json(self.folder, f"counts-{number:05d}.json", outcome)
        return outcome

    def shards(self, outcomes: Iterable[Outcome]) -> list[Shard]:
        """The parts of all outcomes, numbered in their order: the input of the next stage."""
        parts = [part for outcome in outcomes for part in outcome["parts"]]
        return [self.shard(number, part) for number, part in enumerate(parts)]

    def shard(self, number: int, part: Mapping[str, Any]) -> Shard:
        """A part that lies here, as a shard of that number."""
        name, sha256 = part["name"], part["sha256"]
        return Shard(number=number, folder=self.folder, name=name, sha256=sha256)

    def tidy(self, outcomes: Sequence[Outcome]) -> None:
        """Removes what runs left that are of no shard's outcome: of other inputs, or killed."""
        own = {f"counts-{number:05d}.json" for number in range(len(outcomes))}
        for outcome in outcomes:
            own |= {file["name"] for file in (*outcome["parts"], *outcome["aside"].values())}
        kinds = ("counts-", "part-", "dropped-", "quarantined-")
        spare = [n for n in self.folder.names() if n.startswith(kinds) and n not in own]
        self.folder.remove(spare)

    def _table(self, name: str, table: pa.Table) -> dict[str, Any]:
        """Writes a table; the bytes depend on its values alone, not on how they are chunked."""
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.combine_chunks(), sink, compression="zstd", use_dictionary=["source", "reason"]
        )
        data = sink.getvalue()
        self.folder.write(name, data)
        return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def check(result: Result, records: pa.Table, stage: str) -> None:
    """Raises RuntimeError unless each record is kept, dropped or quarantined, in its order."""
    tables = [result.dropped.select(["id"]), result.quarantined.select(["id"])]
    out = pa.concat_tables(tables)["id"].combine_chunks()
    stay = records["id"]
    if len(out):
        stay = stay.filter(pc.invert(pc.is_in(stay, out)))
    if not stay.equals(result.kept["id"]) or len(stay) + len(out) != len(records):
        raise RuntimeError(
            f"the stage {stage!r} does not account for its records: {len(records)} went in, "
            f"{len(result.kept)} were kept, {len(result.dropped)} dropped and "
            f"{len(result.quarantined)} quarantined, or their order changed. Mend the stage."
        )


def write_json(folder: Folder, name: str, tree: Any) -> None:
    """Writes a tree as JSON."""
    folder.write(name, json.dumps(tree, indent=1, ensure_ascii=False).encode())


def read_json(folder: Folder, name: str, key: str) -> Outcome | None:
    """What `write_json` wrote there, if its `key` is this one.

    What cannot be read is not there, and is made again; but a store that does not answer raises
    OSError: all might be there.
    """
    try:
        held: Outcome = json.loads(folder.read(name))
        return held if held["key"] == key else None
    except OSError as error:
        if folder.is_remote and not isinstance(error, FileNotFoundError):
            raise
        return None
    except (ValueError, KeyError, TypeError):
        return None


def _by_reason(table: pa.Table) -> dict[str, int]:
    told = pc.value_counts(table["reason"].combine_chunks()).to_pylist()
    return dict(sorted((row["values"] or "", row["counts"]) for row in told))


def _text_bytes(table: pa.Table) -> int:
    return int(pc.sum(pc.binary_length(table["text"])).as_py() or 0)
