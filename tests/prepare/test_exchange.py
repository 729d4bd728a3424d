"""Rows that meet by key through files, against a dictionary."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from lmjax.prepare import exchange

TYPES = [pa.uint64(), pa.int64(), pa.binary(), pa.binary(16), pa.string()]


def value(kind, number):
    if pa.types.is_integer(kind):
        return number * 7919 - (20_000 if kind == pa.int64() else 0)
    text = f"{number:016d}" if kind == pa.binary(16) else "k" * (number % 5) + str(number)
    return text if kind == pa.string() else text.encode()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("num_shards, num_buckets", [(1, 1), (5, 3), (4, 50)])
def test_equal_keys_meet_in_the_order_of_records(tmp_path, kind, num_shards, num_buckets):
    rng = np.random.default_rng(num_shards)
    expected, files = defaultdict(list), []
    for shard in range(num_shards):
        size = int(rng.integers(0, 40))
        records = pa.table({"id": [f"{shard}#{i}" for i in range(size)]})
        order = exchange.with_order(records, shard)["order"].to_pylist()
        rows = []
        for i in rng.permutation(np.repeat(np.arange(size), rng.integers(0, 4, size))).tolist():
            rows.append({"key": value(kind, int(rng.integers(9))), "id": f"{shard}#{i}"})
            rows[-1] |= {"order": order[i], "n": len(rows)}
        for row in sorted(rows, key=lambda row: row["order"]):  # stable
            expected[row["key"]].append(row)
        schema = pa.schema({"key": kind, "id": pa.string(), "order": pa.int64(), "n": pa.int64()})
        files.append(tmp_path / f"{shard}.arrow")
        exchange.write_by_key(
            files[-1], pa.Table.from_pylist(rows, schema=schema), num_buckets=num_buckets
        )
    found = defaultdict(list)
    for bucket in range(num_buckets):
        rows = exchange.read_by_key(files, bucket).to_pylist()
        keys = [row["key"] for row in rows]
        assert keys == sorted(keys) and not set(keys) & set(found)
        for row in rows:
            found[row["key"]].append(row)
    assert found == expected


def test_decisions_go_home(tmp_path):
    rng = np.random.default_rng(0)
    homes, files = defaultdict(list), []
    for bucket in range(3):
        shards, rows = rng.integers(0, 4, 50), rng.integers(0, 10, 50)
        order = ((shards.astype(np.int64) << 32) + rows).tolist()
        table = pa.table({"id": [str(o) for o in order], "order": order, "n": range(50)})
        for row in table.to_pylist():
            homes[row["order"] >> 32].append(row)
        files.append(tmp_path / f"{bucket}.arrow")
        exchange.write_by_shard(files[-1], table, num_shards=5)
    every = []
    for shard in range(5):
        found = exchange.read_by_shard(files, shard).to_pylist()
        assert found == sorted(homes[shard], key=lambda row: row["order"])
        every += found
    assert exchange.read_all(files, 5).to_pylist() == every


def test_buckets_are_even():
    keys = pa.chunked_array([pa.array(np.arange(20_000, dtype=np.uint64) << np.uint64(20))])
    counts = np.bincount(exchange._bucket(keys, 16).astype(int), minlength=16)
    assert counts.min() > 1000 and counts.max() < 1500
