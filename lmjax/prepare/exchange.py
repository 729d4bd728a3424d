"""Rows that travel between shards: written by one shard, read by key; and decisions back again.

Each shard writes its rows in B runs by a hash of their key; bucket b reads run b of every shard, in
the order of the shards, and sorts it by key. So rows of equal key meet, in the order of records,
through files alone: any engine that can map a function over tasks can do it, with the same bytes.
Decisions travel back likewise, in S runs by shard. Runs are batches of an Arrow file, each found by
its number.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lmjax.prepare.shelf import write_atomically

MOST_BUCKETS = 512
_SHARD = 32  # bits of `order` that number a record in its shard; those above number the shard


def with_order(records: pa.Table, shard: int) -> pa.Table:
    """Adds `order`, each record's place among all records."""
    order = (shard << _SHARD) + np.arange(len(records), dtype=np.int64)
    return records.append_column("order", pa.array(order))


def write_by_key(path: Path, rows: pa.Table, *, num_buckets: int) -> None:
    """Writes a shard's rows in runs by bucket, each in the order of records."""
    by_order = rows.take(pa.array(np.argsort(rows["order"].to_numpy(), kind="stable")))
    buckets = _bucket(by_order["key"], num_buckets)
    _write_runs(path, by_order, buckets, num_buckets)


def write_by_shard(path: Path, decisions: pa.Table, *, num_shards: int) -> None:
    """Writes decisions in runs by the shard that they are for."""
    shards = decisions["order"].to_numpy() >> _SHARD
    _write_runs(path, decisions, shards, num_shards)


def read_by_key(files: Iterable[Path], bucket: int) -> pa.Table:
    """All rows of a bucket, sorted by (key, order)."""
    rows = _read_run(files, bucket)
    key = rows["key"]
    if pa.types.is_integer(key.type):
        return rows.take(pa.array(np.argsort(key.to_numpy(), kind="stable")))
    return rows.take(pc.sort_indices(rows.select(["key"]), [("key", "ascending")]))  # stable


def read_by_shard(files: Iterable[Path], shard: int) -> pa.Table:
    """All decisions for a shard, sorted by order."""
    return by_order(_read_run(files, shard))


def read_all(files: Sequence[Path], num_shards: int) -> pa.Table:
    """All decisions, sorted by order."""
    return pa.concat_tables([read_by_shard(files, shard) for shard in range(num_shards)])


def by_order(decisions: pa.Table) -> pa.Table:
    """The decisions sorted by order; those for one record stay as they stand."""
    return decisions.take(pa.array(np.argsort(decisions["order"].to_numpy(), kind="stable")))


def _bucket(key: pa.ChunkedArray, num_buckets: int) -> np.ndarray:
    """The bucket of each key: a hash of its value, the same in any process."""
    if pa.types.is_integer(key.type):
        bits = key.to_numpy().astype(np.uint64)
    else:
        bits = np.array([zlib.crc32(value) for value in key.cast(pa.binary()).to_pylist()], "u8")
    mixed = (bits ^ (bits >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)  # wraps around
    return (mixed >> np.uint64(32)) % np.uint64(num_buckets)


def _write_runs(path: Path, rows: pa.Table, run_of: np.ndarray, num_runs: int) -> None:
    rows = rows.take(pa.array(np.argsort(run_of, kind="stable"))).combine_chunks()
    ends = np.cumsum(np.bincount(run_of.astype(np.int64), minlength=num_runs)).tolist()

    def write(made: Path) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            pa.OSFile(str(made), "wb") as file,
            pa.ipc.new_file(file, rows.schema, options=options) as writer,
        ):
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                run = rows.slice(begin, end - begin).to_batches()
                writer.write_batch(
                    run[0] if run else pa.RecordBatch.from_pylist([], schema=rows.schema)
                )

    write_atomically(path, write)


def _read_run(files: Iterable[Path], run: int) -> pa.Table:
    found = []
    for path in files:
        with pa.memory_map(str(path)) as file:
            found.append(pa.Table.from_batches([pa.ipc.open_file(file).get_batch(run)]))
    return pa.concat_tables(found, promote_options="default").combine_chunks()
