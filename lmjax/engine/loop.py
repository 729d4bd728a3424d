"""The training loop: dispatches a step, then reads the one before it."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lmjax.core import Batch, Mean
from lmjax.engine import distributed, warm_start
from lmjax.engine.changes import check_changes
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.goodput import Goodput
from lmjax.engine.incidents import Incidents, batch_of
from lmjax.engine.program import Program
from lmjax.engine.replicas import Corrupt, replica_check
from lmjax.engine.report import Report
from lmjax.engine.run import Run, compile_run
from lmjax.engine.session import RunSession, Stopping
from lmjax.engine.state import TrainState
from lmjax.engine.stop import Stop, signals
from lmjax.engine.watchdog import Watchdog
from lmjax.errors import Exit, UserError
from lmjax.sharding import batch_ways

log = logging.getLogger("lmjax")


class Interrupted(Exception):
    """The run was asked to stop, and has saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, which is saved"
        )
        self.exit_code = 128 + signum


class BadStep(UserError):
    """A step was bad and the guard stops the run; its update was not applied."""

    code = Exit.NOT_FINITE


class _Rollback(Exception):
    """Unwinds to where the loop can go back to a checkpoint from before `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def train(
    run: Run,
    workdir: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    devices: Sequence[jax.Device] | None = None,
    quiet: bool = False,
    loaders: warm_start.Loaders | None = None,
) -> TrainState:
    """Trains to the last step, from the newest checkpoint in `workdir` if there is one.

    Of many processes (`engine.distributed.connect`) each makes this call, with the same arguments;
    the first one writes and prints, and all stop after the same step.

    Args:
      run: what to do.
      workdir: holds `config.json`, `metrics.jsonl`, `curves.png`, `samples.txt`, TensorBoard events
        and `checkpoints/`.
      config: the recorded calls that `run` was built from; kept with the run, and compared on
        resume.
      devices: by default all.
      quiet: writes the files and prints nothing.
      loaders: read what `init_from` may name beside checkpoints, by its scheme.

    Raises:
      UserError: for a workdir of another run, a full disk, unreadable checkpoints.
      BadStep: where the loss is no longer a number, or what else the guard calls bad.
      Corrupt: where replicas of a parameter differ.
      Interrupted: after SIGINT or SIGTERM, once the state is saved.
    """
    clock = Goodput()
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made: {error.strerror}.") from error
    run.data.check()
    mesh = run.layout.mesh(devices)
    ways, stages = batch_ways(mesh), mesh.shape["stage"]
    if stages > 1:
        ways *= run.layout.stage_microbatches or stages
    distributed.local_rows(mesh)
    for evaluator in run.evals.values():
        evaluator.check(run.task, run.data, ways=ways)
    about: dict[str, Any] = {
        "config": config or {},
        **run.data.fitted,
        "fitted": sorted(run.data.fitted),
        "fingerprint": run.data.fingerprint,
    }
    _check_folder(workdir, about["config"])
    distributed.check_shared(workdir)
    with contextlib.ExitStack() as stack:
        watchdog = Watchdog(run.watch, workdir, process=jax.process_index(), end=distributed.fail)
        clock.on_beat = stack.enter_context(watchdog).beat
        program = compile_run(run, devices=devices)
        distributed.barrier()  # all have looked at the folder, and compiled
        checkpoints = Checkpoints(
            workdir / "checkpoints", keep_last=run.keep_last, keep_every=run.keep_every
        )
        stack.push(functools.partial(_close, checkpoints))
        incidents = Incidents(workdir, run.guard, seed=run.seed)
        start = functools.partial(
            _start, run, program, checkpoints, incidents, about, loaders=loaders
        )
        state, first = start()
        distributed.barrier()  # what made the state was compiled as well
        if jax.process_index() == 0:
            (workdir / "config.json").write_text(json.dumps(about["config"], indent=1) + "\n")
            for name in about["fitted"]:
                (workdir / f"{name}.json").write_text(about[name])
        report = stack.enter_context(
            Report(run, program, workdir, first_step=first, quiet=quiet, clock=clock)
        )
        report.start()
        stack.enter_context(clock)
        stop = stack.enter_context(signals())
        loop = _Loop(run, program, checkpoints, incidents, report, about, stop, start, state)
        loop.go(first)
        with clock.spent("checkpoint"):
            checkpoints.wait()
        return loop.session.state


class _Loop:
    """One pass from the first step to the last; holds what a step and the one before it share."""

    def __init__(
        self,
        run: Run,
        program: Program,
        checkpoints: Checkpoints,
        incidents: Incidents,
        report: Report,
        about: Mapping[str, Any],
        stop: Stop,
        start: Callable[..., tuple[TrainState, int]],
        state: TrainState,
    ) -> None:
        self.run, self.program, self.checkpoints = run, program, checkpoints
        self.incidents, self.report, self.about = incidents, report, about
        self.stop, self.start, self.clock = stop, start, report.clock
        self.session = RunSession(
            task=run.task,
            data=run.data,
            seed=run.seed,
            program=program,
            state=state,
            workdir=report.workdir,
            clock=self.clock,
            stop=stop,
        )
        self.unread: tuple[int, dict[str, Mean]] | None = None
        self.compare = replica_check(program) if run.watch.replicas_every else None

    def go(self, first: int) -> None:
        """Runs steps first + 1 .. run.steps; goes back to a checkpoint where the guard says so."""
        if first and self.due(first) and not self.report.evaluated(first):
            self.evaluate(first)  # a run that was stopped between saving and evaluating
        while first < self.run.steps:
            try:
                self.steps(first)
                return
            except _Rollback as rollback:
                first = self.roll_back(rollback.step)

    def steps(self, first: int) -> None:
        """Runs steps first + 1 .. run.steps."""
        run, session = self.run, self.session
        batches = self.batches(first)
        for step in range(first + 1, run.steps + 1):
            with self.clock.spent("input"):
                batch = self.program.put(next(batches))
            session.state, metrics = self.program.train_step(session.state, batch)
            self.clock.dispatched(step, metrics["loss"].total)
            self.read()
            self.unread = step, metrics
            if self.compare is not None and step % run.watch.replicas_every == 0:
                self.compare(session.state)
            last = step == run.steps
            if last or step % run.save_every == 0:
                self.save(step)
            if self.due(step) and not self.stop.after(step):
                self.evaluate(step)
            if self.stop.after(step):
                self.save(step)
                with self.clock.spent("checkpoint"):
                    self.checkpoints.wait()
                raise Interrupted(self.stop.signum, step)

    def batches(self, first: int) -> Iterator[Batch]:
        """This process's rows of the batches of steps first + 1, first + 2, ..."""
        run, (shard, num_shards) = self.run, self.session.shards
        start = batch_of(first + 1, self.incidents.left_out)
        read = run.data.batches(
            batch_size=run.batch_size,
            seed=run.seed,
            shard=shard,
            num_shards=num_shards,
            start=start,
        )
        for number, batch in enumerate(read, start):
            if number not in self.incidents.left_out:
                yield batch

    def due(self, step: int) -> bool:
        """Whether an evaluation follows this step."""
        run = self.run
        return step == run.steps or bool(run.eval_every and step % run.eval_every == 0)

    def read(self) -> None:
        """Waits for the step before the one just dispatched; at most two are ever in flight."""
        if self.unread is None:
            return
        step, means = self.unread
        self.unread = None
        values = {name: float(mean.value) for name, mean in jax.device_get(means).items()}
        if values.pop("bad"):
            self.bad(step, values)
            return
        self.incidents.good(step, values)
        self.report.step(step, values)

    def bad(self, step: int, values: Mapping[str, float]) -> None:
        """Does what the guard's policy says of a step whose update was not applied."""
        guard, incidents = self.run.guard, self.incidents
        # Read before a rollback leaves this batch out of the ones that follow.
        rows, position = next(self.batches(step - 1)), self.position(step - 1)
        reason = incidents.bad(step, values)
        within = incidents.count <= guard.limit
        if guard.policy != "skip":
            incidents.keep(step, self.session.state, rows, position)
        what = f"step {step} is bad: {reason}"
        if guard.policy == "skip" and within:
            log.warning("%s. Its update is left out (%d so far).", what, incidents.count)
        elif guard.policy == "rollback" and within:
            log.warning("%s. Its batch will be left out.", what)
            raise _Rollback(step)
        else:
            saved = self.checkpoints.steps()
            where = f"step {saved[-1]} is saved" if saved else "nothing is saved yet"
            count = f" It is bad step {incidents.count}, and the limit is {guard.limit}."
            raise BadStep(
                f"{what}; {where}.{'' if within else count} See where it begins: python -m "
                f"lmjax.replay --workdir={self.report.workdir} --step={step}. Then lower the "
                "learning rate, lengthen the warm-up, clip the gradient, or set guard.policy."
            )

    def roll_back(self, step: int) -> int:
        """Takes the newest state from before `step`; returns the number of steps behind it."""
        self.unread = None
        self.checkpoints.wait()
        del self.session.state  # room for the other
        self.session.state, first = self.start(at_most=step - 1)
        self.report.rewind(first)
        log.warning("went back from step %d to step %d", step, first)
        return first

    def evaluate(self, step: int) -> None:
        """Runs every evaluator on the state after `step`."""
        self.read()
        results: dict[str, float | str] = {}
        with self.clock.spent("evaluation"), contextlib.suppress(Stopping):
            for name, evaluator in self.run.evals.items():
                found = evaluator(self.session)
                results.update({f"{name}/{key}": value for key, value in found.items()})
            self.report.evaluation(step, results)

    def save(self, step: int) -> None:
        """Starts a checkpoint of the state after `step`, whose loss has been seen to be finite."""
        self.read()
        with self.clock.spent("checkpoint"):
            self.checkpoints.save(step, self.session.state, self.position(step))

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` says of the run."""
        left_out = sorted(self.incidents.left_out)
        data = {"next_batch": batch_of(step + 1, left_out), "left_out": left_out}
        return {**self.about, "data": data}


def _check_folder(workdir: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError where the folder holds what is not this run's, and would be overwritten."""
    path = workdir / "config.json"
    if (workdir / "checkpoints").exists() or not path.exists():
        return
    try:
        old = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        old = None
    if old != json.loads(json.dumps(config)) and not (workdir / "metrics.jsonl").exists():
        raise UserError(
            f"{workdir} is no folder of a run: it holds another config.json, which would be lost. "
            "Use another --workdir."
        )


def _start(
    run: Run,
    program: Program,
    checkpoints: Checkpoints,
    incidents: Incidents,
    about: Mapping[str, Any],
    *,
    at_most: int | None = None,
    loaders: warm_start.Loaders | None = None,
) -> tuple[TrainState, int]:
    """The state to go on from, and the number of steps behind it: `at_most` so many, if given."""

    def check(saved: Mapping[str, Any]) -> None:
        check_changes(checkpoints.directory.parent, saved["config"], about["config"])
        for name in about["fitted"]:
            if saved.get(name) != about[name]:
                raise UserError(
                    f"the {name} of this run's checkpoint ({checkpoints.directory}) is another "
                    "than the data gives now: the same numbers would mean something else. Has the "
                    "data changed? Use the old data, or another --workdir."
                )
        if saved["fingerprint"] != about["fingerprint"]:
            raise UserError(
                f"the data of this run's checkpoint ({checkpoints.directory}) is another than what "
                "is there now, though read alike: batches would repeat or be lost. Has the corpus "
                "changed? Use the old corpus, or another --workdir."
            )

    restored = checkpoints.restore(program.abstract_state, check, at_most=at_most)
    if restored is None and run.init_from:
        return warm_start.start(run.init_from, run, program, loaders), 0
    if restored is None:
        return program.init(), 0
    step, state, saved = restored
    if step > run.steps:
        raise UserError(
            f"{checkpoints.directory} is at step {step}, past steps = {run.steps}: nothing to do. "
            "Raise steps, or use another --workdir."
        )
    log.info("continuing from step %d", step)
    incidents.left_out |= set(saved["data"]["left_out"])
    return state, step


def _close(checkpoints: Checkpoints, kind: Any, error: Any, trace: Any) -> None:
    """Closes what was saved, unless this process alone fails: the others would not come to it."""
    del error, trace
    together = kind is None or issubclass(kind, Interrupted | BadStep | Corrupt)
    if together or jax.process_count() == 1:
        checkpoints.close()
