"""A small preparation that has every kind of stage, and a command that runs it.

python -m tests.prepare.small OUT RUNNER INPUT [WORKERS]
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lmjax.data.vocabulary import Bytes
from lmjax.prepare.backends import backend
from lmjax.prepare.pipeline import Prepare, run
from lmjax.prepare.read.source import Source
from lmjax.prepare.split import Split
from lmjax.prepare.stage import Result, judged, with_column
from lmjax.prepare.tokenise import Tokenise

WORDS = ("the", "of", "and", "to", "in")


@dataclass(frozen=True, kw_only=True)
class Lower:
    """Lowers the case, and drops what is too short."""

    least: int = 4

    def __call__(self, records: pa.Table) -> Result:
        texts = [text.lower() for text in records["text"].to_pylist()]
        short = ["too short" if len(text) < self.least else None for text in texts]
        records = with_column(records, "text", pa.array(texts, pa.large_string()))
        return judged(records, short, counts={"texts lowered": len(texts)})


@dataclass(frozen=True, kw_only=True)
class Same:
    """Drops texts that stood before; `decisions` name what they are a copy of."""

    def keys(self, records: pa.Table) -> pa.Table:
        key = [_key(text) for text in records["text"].to_pylist()]
        return (
            pa.table({"key": pa.array(key, pa.uint64())})
            .append_column("id", records["id"])
            .append_column("order", records["order"])
        )

    def reduce(self, rows: pa.Table) -> pa.Table:
        held: dict[int, str] = {}
        again = [
            {"id": row["id"], "order": row["order"], "first": held[row["key"]]}
            for row in rows.to_pylist()
            if held.setdefault(row["key"], row["id"]) != row["id"]
        ]
        schema = pa.schema({"id": pa.string(), "order": pa.int64(), "first": pa.string()})
        return pa.Table.from_pylist(again, schema=schema)

    def decide(self, records: pa.Table, decisions: pa.Table) -> Result:
        first = dict(zip(decisions["id"].to_pylist(), decisions["first"].to_pylist(), strict=True))
        details = [first.get(name) for name in records["id"].to_pylist()]
        return judged(records, ["copy" if d else None for d in details], details=details)


@dataclass(frozen=True, kw_only=True)
class SameStart:
    """Groups texts of one beginning: candidates by a short one, verified by a longer one."""

    short: int = 8
    long: int = 16

    def keys(self, records: pa.Table) -> pa.Table:
        key = [text[: self.short].encode() for text in records["text"].to_pylist()]
        return pa.table([pa.array(key, pa.binary()), records["id"], records["order"]], _KEYS)

    def reduce(self, rows: pa.Table) -> pa.Table:
        keys = rows["key"].to_pylist()
        many = {key for key in keys if keys.count(key) > 1}
        return rows.filter(pa.array([key in many for key in keys], pa.bool_())).select(
            ["id", "order", "key"]
        )

    def evidence(self, records: pa.Table, decisions: pa.Table) -> pa.Table:
        asked = set(decisions["id"].to_pylist())
        found = records.filter(
            pa.array([i in asked for i in records["id"].to_pylist()], pa.bool_())
        )
        key = [text[: self.long].encode() for text in found["text"].to_pylist()]
        return pa.table([pa.array(key, pa.binary()), found["id"], found["order"]], _KEYS)

    def verify(self, rows: pa.Table) -> pa.Table:
        return rows.select(["id", "order", "key"])

    def settle(self, decisions: pa.Table) -> pa.Table:
        first: dict[bytes, str] = {}
        group = [
            first.setdefault(key, name)
            for name, key in zip(
                decisions["id"].to_pylist(), decisions["key"].to_pylist(), strict=True
            )
        ]
        return decisions.select(["id", "order"]).append_column(
            "group", pa.array(group, pa.string())
        )

    def decide(self, records: pa.Table, decisions: pa.Table) -> Result:
        group = dict(zip(decisions["id"].to_pylist(), decisions["group"].to_pylist(), strict=True))
        names = [group.get(name, name) for name in records["id"].to_pylist()]
        return Result(kept=with_column(records, "group", pa.array(names, pa.string())))


_KEYS = ["key", "id", "order"]


def prepare(path: str, **changes: object) -> Prepare:
    """Every kind of stage, in tiny shards."""
    settings = {
        "sources": {
            "lines": Source(path=f"{path}/*.txt", format="lines", licence="CC0", weight=2.0),
            "objects": Source(path=f"{path}/*.jsonl", weight=1.0),
        },
        "stages": {"lower": Lower(), "same": Same(), "start": SameStart(), "again": Lower(least=9)},
        "split": Split(valid=0.2),
        "tokens": Tokenise(vocabulary=Bytes()),
        "shard_bytes": 1200,
    }
    return Prepare(**(settings | changes))


def write_input(folder: Path) -> Path:
    """Texts of few words, so that many are equal or begin alike; and some that cannot be read."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)

    def text(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most))).title()

    for name in "abc":
        (folder / f"{name}.txt").write_text("\n".join(text(7) for _ in range(60)) + "\n")
    lines = [f'{{"text": "{text(12)}", "n": {i}}}' for i in range(120)]
    lines[7] = '{"text": '
    lines[99] = '{"texts": "x"}'
    (folder / "d.jsonl").write_text("\n".join(lines))
    return folder


def tree(out: Path) -> dict[str, str]:
    """The sha256 of every file of a run but those that time and locks are in."""
    return {
        file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name not in ("timing.json", ".lock")
    }


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


if __name__ == "__main__":
    _, out_, runner, input_, *workers_ = sys.argv
    from tests.prepare.small import prepare as ours  # whose stages have this module's name

    run(ours(input_), out_, engine=backend(runner, workdir=out_, workers=int(*workers_ or [2])))
