"""Rows that meet by key through files, against a dictionary."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from lmjax.data.folder import Folder
from lmjax.prepare import exchange
from lmjax.prepare.exchange import Runs

TYPES = [pa.uint64(), pa.int64(), pa.binary(), pa.binary(16), pa.string()]


def value(kind, number):
    if pa.types.is_integer(kind):
        return number * 7919 - (20_000 if kind == pa.int64() else 0)
    text = f"{number:016d}" if kind == pa.binary(16) else "k" * (number % 5) + str(number)
    return text if kind == pa.string() else text.encode()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("num_shards, num_buckets", [(1, 1), (5, 3), (4, 50)])
@pytest.mark.parametrize("part_bytes", [1 << 26, 600])
def test_equal_keys_meet_in_the_order_of_records(
    tmp_path, monkeypatch, kind, num_shards, num_buckets, part_bytes
):
    monkeypatch.setattr(exchange, "_PART_BYTES", part_bytes)
    rng = np.random.default_rng(num_shards)
    expected = defaultdict(list)
    sent = Runs(folder=Folder(str(tmp_path)), what="keys", files=num_shards, runs=num_buckets)
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
        assert not sent.there(shard)
        made = pa.Table.from_pylist(rows, schema=schema)
        order = np.array(made["order"].to_pylist(), np.int64) & 0xFFFFFFFF
        pieces = [made.filter(pa.array(order < 20)), made.filter(pa.array(order >= 20))]
        exchange.write_by_key(sent, shard, pieces)
        assert sent.there(shard)
    found, parts = defaultdict(list), 0
    for bucket in range(num_buckets):
        for part in exchange.read_by_key(sent, bucket):
            rows = part.to_pylist()
            parts += bool(rows)
            keys = [row["key"] for row in rows]
            assert keys == sorted(keys) and not set(keys) & set(found)
            for row in rows:
                found[row["key"]].append(row)
    assert found == expected
    if part_bytes > 600:
        assert parts <= num_buckets
    elif num_shards > num_buckets:
        assert parts > num_buckets


def test_decisions_go_home(tmp_path):
    rng = np.random.default_rng(0)
    homes = defaultdict(list)
    decided = Runs(folder=Folder(str(tmp_path)), what="decided", files=3, runs=5)
    for bucket in range(3):
        shards, rows = rng.integers(0, 4, 50), rng.integers(0, 10, 50)
        order = ((shards.astype(np.int64) << 32) + rows).tolist()
        table = pa.table({"id": [str(o) for o in order], "order": order, "n": range(50)})
        for row in table.to_pylist():
            homes[row["order"] >> 32].append(row)
        exchange.write_by_shard(decided, bucket, table)
    every = []
    for shard in range(5):
        found = exchange.read_by_shard(decided, shard).to_pylist()
        assert found == sorted(homes[shard], key=lambda row: row["order"])
        every += found
    assert exchange.read_all(decided).to_pylist() == every


def test_buckets_are_even():
    keys = pa.chunked_array([pa.array(np.arange(20_000, dtype=np.uint64) << np.uint64(20))])
    counts = np.bincount((exchange._hash(keys) % 16).astype(int), minlength=16)
    assert counts.min() > 1000 and counts.max() < 1500


def test_decisions_are_cut_between_records():
    rng = np.random.default_rng(0)
    for most in (1, 50, 200, 10**6):
        texts = ["x" * int(n) for n in rng.integers(0, 60, 30)]
        rows = np.sort(rng.integers(0, 30, 90))
        records = exchange.with_order(pa.table({"text": pa.array(texts, pa.large_string())}), 3)
        decisions = pa.table({"order": (3 << 32) + rows})
        cuts = list(exchange.cut_by_bytes(records, decisions, most))
        assert [i for begin, end in cuts for i in range(begin, end)] == list(range(90))
        for begin, end in cuts:
            own = rows[begin:end]
            assert end == 90 or rows[end] != own[-1]
            assert len(set(own.tolist())) == 1 or sum(len(texts[row]) for row in own) <= most
        weight = [sum(len(texts[row]) for row in rows[begin:end]) for begin, end in cuts]
        assert all(a + b > most or most == 1 for a, b in itertools.pairwise(weight))
    none = decisions.slice(0, 0)
    assert list(exchange.cut_by_bytes(records, none, 5)) == [(0, 0)]
