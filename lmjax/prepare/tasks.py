"""Tasks: pure pieces of work on one shard or one bucket, whose results are files.

A task finds out for itself whether it is done, and passes on what was done before. It may run in
any process of any machine that sees the folder; the engine brings back its small `Done`.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from lmjax.data.folder import is_remote, told
from lmjax.errors import UserError
from lmjax.prepare import exchange
from lmjax.prepare.exchange import Runs
from lmjax.prepare.identity import digest
from lmjax.prepare.read.sheet import Piece, Sheet
from lmjax.prepare.read.source import Cuttable, Format
from lmjax.prepare.shelf import Outcome, Shard, Shelf, check, read_json, write_json
from lmjax.prepare.stage import Keyed, Result, Settled, Stage, Verified

_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_EVIDENCE_BYTES = 1 << 24  # of texts whose evidence is made at once
_PART_CHARACTERS = 1 << 26  # of text in one part of what a reader gives


@dataclass
class Done:
    """What a task brings back: an outcome for each of its steps, and how long each took.

    Attributes:
      outcomes: by stage; of a shard that went through several stages, in their order.
      seconds: (of the clock, of the processor) by stage; of none that was done before.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)


class Task(Protocol):
    """One piece of work."""

    def run(self) -> Done:
        """Does it, or finds it done."""


class Timer:
    """Adds up the time of one stage in a task."""

    def __init__(self, done: Done, stage: str) -> None:
        self.done, self.stage = done, stage

    def __enter__(self) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self.done.seconds.get(self.stage, (0.0, 0.0))
        wall += time.perf_counter() - self.begin[0]
        self.done.seconds[self.stage] = wall, cpu + time.process_time() - self.begin[1]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Finds the parts that a large file can be read in; its outcome lists them."""

    number: int
    piece: Piece
    form: Cuttable
    target: int
    shelf: Shelf

    def run(self) -> Done:
        """Reads the file once, if that was not done."""
        done = Done()
        file = self.piece.file
        key = digest([self.shelf.key, file.path, file.name, file.size, file.version, self.target])
        name = f"cut-{self.number:05d}.json"
        found = read_json(self.shelf.folder, name, key)
        if found is None:
            with Timer(done, "read"):
                pieces = self.form.cut(file, target=self.target)
                found = {"key": key, "pieces": [[p.begin, p.end, p.first] for p in pieces]}
                write_json(self.shelf.folder, name, found)
        done.outcomes["cut"] = found
        return done


@dataclass(frozen=True, kw_only=True)
class Read:
    """Reads some pieces of one source into parts of records."""

    number: int
    source: str
    pieces: Sequence[tuple[Piece, Format | None]]
    shelf: Shelf

    def run(self) -> Done:
        """Reads them, if that was not done."""
        done = Done()
        asked = [
            [p.file.path, p.file.name, p.file.size, p.file.version, p.begin, p.end, p.first]
            for p, _ in self.pieces
        ]
        key = digest([self.shelf.key, self.source, asked])
        outcome = self.shelf.outcome(self.number, key)
        if outcome is None:
            with Timer(done, "read"):
                outcome = self.shelf.put(self.number, key, self._parts())
        done.outcomes["read"] = outcome
        return done

    def _parts(self) -> Iterator[Result]:
        sheet = Sheet(self.source)
        for piece, form in self.pieces:
            sheet.begin(piece.file)
            if form is None:
                sheet.bad(0, 0, "of no known format: set the source's format", b"")
                continue
            try:
                for _ in form.read(piece, sheet):
                    if sheet.chars > _PART_CHARACTERS:
                        yield sheet.take()
                piece.file.check()
            except UserError:
                raise
            except Exception as error:
                # The network or the machine, not the file: run again, nothing is lost.
                if is_remote(piece.file.path):  # whose drivers have errors of many kinds
                    with told(piece.file.path, "read"):
                        raise
                if not isinstance(error, OSError) or error.errno in _EXHAUSTED:
                    raise
                sheet.bad(piece.first, piece.begin, f"cannot be read: {error.strerror}", b"")
        yield sheet.take()


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage with its name and folder; of a keyed one also what the exchange decided.

    Attributes:
      inputs: a hash of all shards, where the stage saw all of them.
      decisions: files that hold the decisions in runs by shard.
    """

    name: str
    stage: Stage | Keyed
    shelf: Shelf
    inputs: str = ""
    decisions: Runs | None = None

    def key(self, shard: Shard) -> str:
        """Under which the outcome of a shard is found."""
        return digest([self.shelf.key, shard.sha256, self.inputs])

    def judge(self, records: pa.Table, shard: Shard) -> Result:
        """What becomes of the records of a shard."""
        if isinstance(self.stage, Keyed):
            assert self.decisions is not None
            decisions = exchange.read_by_shard(self.decisions, shard.number)
            return self.stage.decide(records, decisions)
        return self.stage(records)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Takes a shard through stages, up to the next that must see other shards first."""

    shard: Shard
    steps: Sequence[Step]

    def run(self) -> Done:
        """Runs the stages that are not done."""
        done, shard, records = Done(), self.shard, None
        for step in self.steps:
            key = step.key(shard)
            outcome = step.shelf.outcome(shard.number, key)
            if outcome is not None:
                records = None
            else:
                with Timer(done, step.name):
                    records = shard.load() if records is None else records
                    result = step.judge(records, shard)
                    check(result, records, step.name)
                    outcome = step.shelf.put(shard.number, key, [result], rows=len(records))
                    records = result.kept
            done.outcomes[step.name] = outcome
            shard = step.shelf.shard(shard.number, outcome["parts"][0])
        return done


@dataclass(frozen=True, kw_only=True)
class Send:
    """Writes the rows of a shard that meet others: a keyed stage's keys, or its evidence.

    Attributes:
      sent: where they go: one file a shard.
      candidates: the decisions that evidence is asked for by; None for keys.
    """

    name: str
    stage: Keyed
    shard: Shard
    sent: Runs
    candidates: Runs | None = None

    def run(self) -> Done:
        """Writes them, if that was not done."""
        done = Done()
        if not self.sent.there(self.shard.number):
            with Timer(done, self.name):
                exchange.write_by_key(self.sent, self.shard.number, self._rows())
        return done

    def _rows(self) -> Iterator[pa.Table]:
        """Keys in one piece; evidence, of which a record may give much, in several."""
        records = exchange.with_order(self.shard.load(), self.shard.number)
        if self.candidates is None:
            yield self.stage.keys(records)
            return
        assert isinstance(self.stage, Verified)
        found = exchange.read_by_shard(self.candidates, self.shard.number)
        for begin, end in exchange.cut_by_bytes(records, found, _EVIDENCE_BYTES):
            yield self.stage.evidence(records, found.slice(begin, end - begin))


@dataclass(frozen=True, kw_only=True)
class Reduce:
    """Brings rows of equal key together, one bucket of keys, and writes what is decided.

    Attributes:
      sent: files of rows.
      decided: where the decisions go: one file a bucket.
      verify: whether the rows are evidence.
    """

    name: str
    stage: Keyed
    bucket: int
    sent: Runs
    decided: Runs
    verify: bool = False

    def run(self) -> Done:
        """Decides, if that was not done."""
        done = Done()
        if not self.decided.there(self.bucket):
            with Timer(done, self.name):
                decide = self.stage.reduce
                if self.verify:
                    assert isinstance(self.stage, Verified)
                    decide = self.stage.verify
                parts = exchange.read_by_key(self.sent, self.bucket)
                decisions = pa.concat_tables(map(decide, parts), promote_options="default")
                exchange.write_by_shard(self.decided, self.bucket, decisions)
        return done


@dataclass(frozen=True, kw_only=True)
class Settle:
    """Looks at all decisions at once."""

    name: str
    stage: Settled
    decided: Runs
    settled: Runs

    def run(self) -> Done:
        """Settles, if that was not done."""
        done = Done()
        if not self.settled.there(0):
            with Timer(done, self.name):
                decisions = self.stage.settle(exchange.read_all(self.decided))
                exchange.write_by_shard(self.settled, 0, decisions)
        return done
