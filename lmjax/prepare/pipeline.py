"""A preparation: sources, stages in their order, a split and tokens; and how it is run.

OUT/config.json            the config, whole
OUT/stages/NN-NAME-KEY8/   what became of each shard (lmjax/prepare/shelf.py)
OUT/quarantine/NAME.jsonl  what could not be handled, by stage
OUT/tokens/{train,valid}/  token stores (lmjax/data/store.py)
OUT/report.json, .md       records at every stage, by reason
OUT/manifest.json          sources, licences, counts, hashes, config, code
OUT/timing.json            seconds: the one file that differs from run to run
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmjax.data.folder import Folder
from lmjax.errors import UserError
from lmjax.prepare import tokens as tokens_
from lmjax.prepare.backends import Backend
from lmjax.prepare.exchange import MOST_BUCKETS, Runs
from lmjax.prepare.identity import describe, digest, identity
from lmjax.prepare.lock import alone
from lmjax.prepare.plan import files_of, plan_reading
from lmjax.prepare.read.source import Source
from lmjax.prepare.report import FORMAT, Account
from lmjax.prepare.shelf import Shard, Shelf, write_json
from lmjax.prepare.split import Split
from lmjax.prepare.stage import Keyed, Settled, Stage, Verified
from lmjax.prepare.tasks import Done, Reduce, Send, Settle, Step, Task, Walk

log = logging.getLogger("lmjax")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """What is prepared, and how.

    Attributes:
      sources: where records come from, by name; their order is that of the records.
      stages: what happens to them, by name and in this order.
      split: which records validate; None keeps all for training.
      tokens: what makes tokens of them; None ends with records.
      shard_bytes: about how many bytes of input make a shard, at all stages. No record depends on
        it; the shards of the token stores are these.
    """

    sources: Mapping[str, Source]
    stages: Mapping[str, Stage | Keyed] = field(default_factory=dict)
    split: Split | None = field(default_factory=Split)
    tokens: tokens_.Tokeniser | None = None
    shard_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources is empty: name at least one, as {'web': call(Source, ...)}.")
        without = [name for name, source in self.sources.items() if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise UserError(
                f"the source {without[0]!r} has no weight, and others have one: give each a weight "
                "(0 for none of it in training), or none at all."
            )
        for name in (*self.sources, *self.stages):
            if not name.replace("-", "").replace("_", "").isalnum():
                raise UserError(f"{name!r} names a folder: use letters, digits, - and _.")
        if taken := {"read", "split", tokens_.STAGE} & set(self.stages):
            raise UserError(f"a stage is named {min(taken)!r}, which is taken. Choose another.")
        for name, stage in self.stages.items():
            if not callable(stage) and not isinstance(stage, Keyed):
                raise UserError(f"stages.{name} is neither a Stage nor a Keyed: {stage!r}.")
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes is {self.shard_bytes}: give at least 1.")


class Run:
    """One run of a preparation in a folder: an engine that keeps the books."""

    def __init__(self, prepare: Prepare, workdir: Folder, engine: Backend) -> None:
        self.prepare, self.workdir, self.engine = prepare, workdir, engine
        self.account = Account()
        self._key, self._number = FORMAT, 0

    def shelf(self, name: str, held: Any) -> Shelf:
        """The folder of the next stage: its key hashes the stage and all before it."""
        self._key = digest([self._key, name, held])
        folder = f"{self._number:02d}-{name}-{self._key[:8]}"
        self._number += 1
        self.account.begin(name, folder, self._key)
        return Shelf(self.workdir / f"stages/{folder}", self._key)

    def map(self, tasks: Sequence[Task]) -> list[Done]:
        """Runs tasks, and books their outcomes and times."""
        done = self.engine.map(tasks)
        for each in done:
            self.account.book(each)
        return done

    def read(self) -> list[Shard]:
        """Reads all sources; returns the shards of records."""
        sources = self.prepare.sources
        held = {name: [name, identity(source.format)] for name, source in sources.items()}
        shelf = self.shelf("read", [list(held.values()), self.prepare.shard_bytes])
        log.info("read: %s", ", ".join(sources))
        tasks = plan_reading(sources, self.prepare.shard_bytes, shelf, self)
        self.account.files = files_of(tasks)
        outcomes = [done.outcomes["read"] for done in self.map(tasks)]
        shelf.tidy(outcomes)
        return shelf.shards(outcomes)

    def walk(self, stages: Sequence[tuple[str, Stage | Keyed]], shards: list[Shard]) -> list[Shard]:
        """Takes all shards through some stages, of which the first alone may be keyed."""
        steps = []
        for name, stage in stages:
            shelf = self.shelf(name, identity(stage))
            step = Step(name=name, stage=stage, shelf=shelf)
            if isinstance(stage, Keyed):
                step = self.meet(name, stage, shelf, shards)
            steps.append(step)
        log.info("%s: %d shards", ", ".join(name for name, _ in stages), len(shards))
        done = self.map([Walk(shard=shard, steps=steps) for shard in shards])
        for step in steps:
            step.shelf.tidy([each.outcomes[step.name] for each in done])
        first = steps[0].shelf.folder
        for name in first.names("exchange-*"):  # spent
            (first / name).remove_all()
        last = steps[-1]
        return last.shelf.shards([each.outcomes[last.name] for each in done])

    def meet(self, name: str, stage: Keyed, shelf: Shelf, shards: list[Shard]) -> Step:
        """Lets the shards meet in a keyed stage; returns the step that judges them."""
        buckets = min(len(shards), MOST_BUCKETS)
        inputs = digest([shard.sha256 for shard in shards])
        folder = shelf.folder / f"exchange-{inputs[:8]}"

        def runs(what: str, *, by_key: bool = False, files: int = buckets) -> Runs:
            sizes = (len(shards), buckets) if by_key else (files, len(shards))
            return Runs(folder=folder, what=what, files=sizes[0], runs=sizes[1])

        last = runs("verified" if isinstance(stage, Verified) else "reduced")
        decisions = runs("settled", files=1) if isinstance(stage, Settled) else last
        step = Step(name=name, stage=stage, shelf=shelf, inputs=inputs, decisions=decisions)
        if all(shelf.outcome(shard.number, step.key(shard)) is not None for shard in shards):
            return step
        log.info("%s: %d shards meet in %d buckets", name, len(shards), buckets)

        def round_of(sent: Runs, decided: Runs, candidates: Runs | None) -> None:
            self.map(
                [
                    Send(name=name, stage=stage, shard=shard, sent=sent, candidates=candidates)
                    for shard in shards
                ]
            )
            verify = candidates is not None
            self.map(
                [
                    Reduce(
                        name=name, stage=stage, bucket=b, sent=sent, decided=decided, verify=verify
                    )
                    for b in range(buckets)
                ]
            )

        round_of(runs("keys", by_key=True), runs("reduced"), None)
        if isinstance(stage, Verified):
            round_of(runs("evidence", by_key=True), last, runs("reduced"))
        if isinstance(stage, Settled):
            self.map([Settle(name=name, stage=stage, decided=last, settled=decisions)])
        return step

    def prune(self, remove: bool) -> None:
        """Removes the folders of stages that are not of this config, or says that they are there.

        What an earlier config gave may be wanted again: nothing is removed unasked.
        """
        stages = self.workdir / "stages"
        own = {held["folder"] for held in self.account.stages.values()}
        others = [name for name in stages.names() if name not in own]
        if not others:
            return
        if remove:
            for name in others:
                (stages / name).remove_all()
        size = "" if remove else " --prune removes them."
        did = "were removed" if remove else "are kept for reuse."
        log.info("%d folders of stages of earlier configs %s%s", len(others), did, size)


def segments(
    stages: Mapping[str, Stage | Keyed],
) -> Iterator[list[tuple[str, Stage | Keyed]]]:
    """Cuts the stages before each keyed one: those of a segment take a shard in one go."""
    segment: list[tuple[str, Stage | Keyed]] = []
    for name, stage in stages.items():
        if isinstance(stage, Keyed) and segment:
            yield segment
            segment = []
        segment.append((name, stage))
    if segment:
        yield segment


def run(
    prepare: Prepare,
    workdir: str,
    *,
    engine: Backend,
    config: Mapping[str, Any] | None = None,
    prune: bool = False,
) -> Mapping[str, Any]:
    """Runs a preparation, or goes on with it; returns its manifest.

    Args:
      prepare: what to do.
      workdir: OUT, a folder that all machines of the engine see, or an address of an object store.
      engine: what runs the tasks.
      config: the recorded calls that `prepare` was built from, for the manifest.
      prune: whether to remove, at the end, the stages of earlier configs.
    """
    out = Folder(workdir)
    with alone(out):
        tree = config or describe(prepare)
        write_json(out, "config.json", tree)
        this = Run(prepare, out, engine)
        shards = this.read()
        stages = dict(prepare.stages)
        if prepare.split is not None:
            stages["split"] = prepare.split
        for segment in segments(stages):
            shards = this.walk(segment, shards)
        stores: dict[str, Any] = {}
        if prepare.tokens is not None and not this.account.rows()[-1]["kept"]:
            this.account.write(out, prepare, tree, stores)
            raise UserError(
                f"no record is left to make tokens of: {workdir}/report.md says at which stage, "
                "and why; a reader that finds no text may need another text='COLUMN'."
            )
        if prepare.tokens is not None:
            shelf = this.shelf(tokens_.STAGE, identity(prepare.tokens))
            log.info("%s: %d shards", tokens_.STAGE, len(shards))
            more = this.account.about(prepare.sources)
            stores = tokens_.make_stores(prepare.tokens, shards, shelf, this, more)
            tokens_.publish(shelf, stores, out / "tokens")
        else:
            (out / "tokens").remove_all()
        this.prune(prune)
        return this.account.write(out, prepare, tree, stores)
