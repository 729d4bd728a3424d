"""Rows that travel between shards: written by one shard, read by key; and decisions back again.

Each shard writes its rows in B runs by a hash of their key; bucket b reads run b of every shard, in
the order of the shards, and sorts it by key. So rows of equal key meet, in the order of records,
through files alone: any engine that can map a function over tasks can do it, with the same bytes.
Decisions travel back likewise, in S runs by shard.

A file of R runs is R + 2 pairs of int64: where each run begins, in bytes, and what those before it
hold once they are decompressed. Then come the runs, each some streams of Arrow, or nothing where it
is empty, and last an empty table, which tells the columns. What is large is written in several
pieces, and a large bucket is cut once more, into parts by key: memory holds one of them.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lmjax.data.folder import Folder

MOST_BUCKETS = 4096  # each file of keys has as many runs
_SHARD = 32  # bits of `order` that number a record in its shard; those above number the shard
_AT_ONCE = 256  # files that are read together
_PART_BYTES = 1 << 26  # of a bucket, decompressed, that are sorted at once


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Files of runs that have one purpose.

    Attributes:
      folder: where they lie.
      what: the purpose.
      files: how many files there are.
      runs: how many runs each has.
    """

    folder: Folder
    what: str
    files: int
    runs: int

    def name(self, number: int) -> str:
        """A file's name."""
        return f"{self.what}-{number:05d}.runs"

    def there(self, number: int) -> bool:
        """Whether a file was written."""
        return self.folder.size(self.name(number)) is not None

    def read(self, run: int) -> pa.Table:
        """One run of all files, in their order."""
        return self._concat(list(self._pieces(self._ranges(run))))

    def read_parts(self, run: int) -> Iterator[pa.Table]:
        """Likewise of rows by key, but of a large run one part of the keys after another."""
        ranges = self._ranges(run)
        num_parts = 1 + sum(size for *_, size in ranges) // _PART_BYTES
        if num_parts == 1:
            yield self._concat(list(self._pieces(ranges)))
            return

        def parted() -> Iterator[tuple[pa.Table, np.ndarray]]:
            for rows in self._pieces(ranges):
                yield rows, _hash(rows["key"]) // np.uint64(self.runs) % np.uint64(num_parts)

        with TemporaryDirectory(prefix=".", suffix=".tmp", dir=self._place()) as place:
            parts = Runs(folder=Folder(place), what="parts", files=1, runs=num_parts)
            parts.write(0, parted())
            for part in range(num_parts):
                yield parts.read(part)

    def read_all(self) -> pa.Table:
        """All runs of all files: file after file, and in each in their order."""
        found = []
        for number in range(self.files):
            data = self.folder.read(self.name(number))
            begin, end = np.frombuffer(data, "<i8", 2 * self.runs + 1)[[0, -1]].tolist()
            found += list(_tables(data[begin:end])) if begin < end else [self._columns()]
        return self._concat(found)

    def write(self, number: int, pieces: Iterable[tuple[pa.Table, np.ndarray]]) -> None:
        """Writes a file: each row of each piece into its run, where rows stay in their order.

        Args:
          number: the file's.
          pieces: at least one table, and the run of each of its rows.
        """
        extents: list[list[tuple[int, int]]] = [[] for _ in range(self.runs + 1)]
        told = np.zeros((self.runs + 2, 2), "<i8")
        with (
            self.folder.create(self.name(number)) as file,
            TemporaryFile(dir=self._place()) as spool,
        ):
            for piece, run_of in pieces:
                rows = piece.take(pa.array(np.argsort(run_of, kind="stable"))).combine_chunks()
                sizes = np.bincount(run_of.astype(np.int64), minlength=self.runs)
                ends = np.cumsum(sizes).tolist()
                for run, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
                    if begin < end:
                        some = rows.slice(begin, end - begin)
                        extents[run].append(_append(spool, some))
                        told[run + 1, 1] += some.nbytes
                extents[-1] = extents[-1] or [_append(spool, rows.slice(0, 0))]
            file.write(told.tobytes())
            for run, found in enumerate(extents):
                told[run, 0] = file.tell()
                for begin, end in found:
                    spool.seek(begin)
                    file.write(spool.read(end - begin))
            told[-1, 0] = file.tell()
            file.seek(0)
            file.write(np.stack([told[:, 0], np.cumsum(told[:, 1])], axis=1).tobytes())

    def _ranges(self, run: int) -> list[tuple[str, int, int, int]]:
        """Where a run lies in each file that has rows of it, and their bytes in memory."""
        assert 0 <= run < self.runs, (run, self.runs)
        found, names = [], [self.name(number) for number in range(self.files)]
        for first in range(0, self.files, _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            told = self.folder.read_ranges([(name, 16 * run, 16 * run + 32) for name in some])
            for name, pairs in zip(some, told, strict=True):
                begin, before, end, after = np.frombuffer(pairs, "<i8").tolist()
                if begin < end:
                    found.append((name, begin, end, after - before))
        return found

    def _pieces(self, ranges: list[tuple[str, int, int, int]]) -> Iterator[pa.Table]:
        """What lies there, in the pieces that it was written in."""
        for first in range(0, len(ranges), _AT_ONCE):
            some = [(name, begin, end) for name, begin, end, _ in ranges[first : first + _AT_ONCE]]
            for data in self.folder.read_ranges(some):
                yield from _tables(data)

    def _place(self) -> str | None:
        """Where what does not fit into memory goes meanwhile; None for the system's own place."""
        if self.folder.is_remote:
            return None
        Path(self.folder.path).mkdir(parents=True, exist_ok=True)
        return self.folder.path

    def _concat(self, tables: list[pa.Table]) -> pa.Table:
        tables = tables or [self._columns()]
        return pa.concat_tables(tables, promote_options="default").combine_chunks()

    def _columns(self) -> pa.Table:
        """No rows, of the columns that the first file has."""
        (told,) = self.folder.read_ranges([(self.name(0), 16 * self.runs, 16 * self.runs + 32)])
        begin, _, end, _ = np.frombuffer(told, "<i8").tolist()
        return next(_tables(self.folder.read_ranges([(self.name(0), begin, end)])[0]))


def with_order(records: pa.Table, shard: int) -> pa.Table:
    """Adds `order`, each record's place among all records."""
    order = (shard << _SHARD) + np.arange(len(records), dtype=np.int64)
    return records.append_column("order", pa.array(order))


def write_by_key(to: Runs, shard: int, pieces: Iterable[pa.Table]) -> None:
    """Writes a shard's rows in runs by bucket, each in the order of records.

    Args:
      to: where they go.
      shard: the number of the shard.
      pieces: rows of the first records, of those that follow, ...
    """

    def placed() -> Iterator[tuple[pa.Table, np.ndarray]]:
        for rows in pieces:
            ordered = by_order(rows)
            yield ordered, _hash(ordered["key"]) % np.uint64(to.runs)

    to.write(shard, placed())


def write_by_shard(to: Runs, bucket: int, decisions: pa.Table) -> None:
    """Writes decisions in runs by the shard that they are for."""
    to.write(bucket, [(decisions, decisions["order"].to_numpy() >> _SHARD)])


def read_by_key(sent: Runs, bucket: int) -> Iterator[pa.Table]:
    """All rows of a bucket, sorted by (key, order); of a large one some of the keys at a time."""
    for rows in sent.read_parts(bucket):
        key = rows["key"]
        if pa.types.is_integer(key.type):
            yield rows.take(pa.array(np.argsort(key.to_numpy(), kind="stable")))
        else:  # stable
            yield rows.take(pc.sort_indices(rows.select(["key"]), [("key", "ascending")]))


def cut_by_bytes(records: pa.Table, decisions: pa.Table, most: int) -> Iterator[tuple[int, int]]:
    """Cuts a shard's decisions, sorted by order, into runs (first, one past the last).

    A run holds all decisions for its records, whose texts have at most so many bytes, each counted
    once for each decision; or it is of one record.
    """
    rows = decisions["order"].to_numpy() & ((1 << _SHARD) - 1)
    sizes = pc.fill_null(pc.binary_length(records["text"]), 0).to_numpy()
    done = np.cumsum(sizes[rows])
    first_of = np.flatnonzero(np.diff(rows, prepend=-1))
    begin = base = 0
    for this, following in itertools.pairwise([*first_of.tolist(), len(rows)]):
        if this > begin and done[following - 1] - base > most:
            yield begin, this
            begin, base = this, int(done[this - 1])
    yield begin, len(rows)


def read_by_shard(decided: Runs, shard: int) -> pa.Table:
    """All decisions for a shard, sorted by order."""
    return by_order(decided.read(shard))


def read_all(decided: Runs) -> pa.Table:
    """All decisions, sorted by order."""
    return by_order(decided.read_all())


def by_order(decisions: pa.Table) -> pa.Table:
    """The decisions sorted by order; those for one record stay as they stand."""
    return decisions.take(pa.array(np.argsort(decisions["order"].to_numpy(), kind="stable")))


def _append(file: BinaryIO, rows: pa.Table) -> tuple[int, int]:
    """Appends a stream of Arrow; returns where it lies."""
    begin = file.tell()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(file, rows.schema, options=options) as stream:
        stream.write_table(rows)
    return begin, file.tell()


def _tables(data: bytes) -> Iterator[pa.Table]:
    """The tables of the streams that follow each other."""
    buffer = pa.BufferReader(data)
    while buffer.tell() < len(data):
        yield pa.ipc.open_stream(buffer).read_all()


def _hash(key: pa.ChunkedArray) -> np.ndarray:
    """A number of 32 bits for each key, the same in any process; uint64."""
    if pa.types.is_integer(key.type):
        bits = key.to_numpy().astype(np.uint64)
    else:
        bits = np.array([zlib.crc32(value) for value in key.cast(pa.binary()).to_pylist()], "u8")
    mixed = (bits ^ (bits >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)  # wraps around
    return mixed >> np.uint64(32)
