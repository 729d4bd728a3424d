"""Drives keyed stages without any engine: shards, one exchange after another, in plain Python."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lmjax.prepare.stage import RECORD, Result, Settled, Verified


def records(texts: Sequence[str], *, source: str = "s", metas: Sequence[str] = ()) -> pa.Table:
    return pa.table(
        {
            "id": [f"{source}/file#{i}" for i in range(len(texts))],
            "text": texts,
            "source": [source] * len(texts),
            "meta": list(metas) or [""] * len(texts),
        },
        schema=RECORD,
    )


def check(stage_input: pa.Table, result: Result) -> Result:
    """The invariant of every stage: each record is kept, dropped or quarantined, once."""
    out = [*result.kept["id"].to_pylist(), *result.dropped["id"].to_pylist()]
    out += result.quarantined["id"].to_pylist()
    assert sorted(out) == sorted(stage_input["id"].to_pylist())
    kept = set(result.kept["id"].to_pylist())
    assert result.kept["id"].to_pylist() == [i for i in stage_input["id"].to_pylist() if i in kept]
    assert result.kept.schema.names[:4] == RECORD.names
    assert result.kept["text"].type == pa.large_string()
    assert None not in result.dropped["reason"].to_pylist()
    return result


def run(stage: Any, table: pa.Table, *, shards: int = 1, exchanges: int = 1) -> Result:
    """What the stage makes of a table that is cut into shards, keys into `exchanges` parts."""
    order = pa.array([7 * i + 3 for i in range(len(table))], pa.int64())
    table = table.append_column("order", order)
    size = max(-(-len(table) // shards), 1)
    parts = [table.slice(i, size) for i in range(0, len(table), size)]
    decisions = _exchange([stage.keys(p) for p in parts], stage.reduce, exchanges)
    if isinstance(stage, Verified):
        rows = [stage.evidence(p, _of(p, decisions)) for p in parts]
        decisions = _exchange(rows, stage.verify, exchanges)
    if isinstance(stage, Settled):
        decisions = stage.settle(decisions)
    results = []
    for part in parts:
        plain = part.drop_columns("order")
        results.append(check(plain, stage.decide(plain, _of(part, decisions))))
    return merge(results)


def merge(results: Sequence[Result]) -> Result:
    counts: dict[str, int] = {}
    for result in results:
        for name, count in result.counts.items():
            counts[name] = counts.get(name, 0) + count
    return Result(
        kept=pa.concat_tables([r.kept for r in results]),
        dropped=pa.concat_tables([r.dropped for r in results]),
        quarantined=pa.concat_tables([r.quarantined for r in results]),
        counts=counts,
    )


def _exchange(rows: Sequence[pa.Table], reduce: Any, exchanges: int) -> pa.Table:
    every = pa.concat_tables(rows).sort_by([("key", "ascending"), ("order", "ascending")])
    distinct = pc.unique(every["key"])
    size = max(-(-len(distinct) // exchanges), 1)
    parts = [distinct[i : i + size] for i in range(0, len(distinct), size)] or [distinct]
    out = [reduce(every.filter(pc.is_in(every["key"], part))) for part in parts]
    return pa.concat_tables(out).sort_by("order")


def _of(part: pa.Table, decisions: pa.Table) -> pa.Table:
    return decisions.filter(pc.is_in(decisions["order"], part["order"].combine_chunks()))
