"""The training loop: dispatches a step, then reads the one before it."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax

from lmjax.core import Batch, Dataset, Evaluator, Mean, Task, Variables
from lmjax.engine import distributed
from lmjax.engine.changes import check_changes
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.precision import Precision
from lmjax.engine.program import Draft, Program, draft_program
from lmjax.engine.report import Report
from lmjax.engine.state import TrainState
from lmjax.engine.stop import Stop, signals
from lmjax.errors import UserError
from lmjax.sharding import Layout, batch_ways

log = logging.getLogger("lmjax")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that defines a training run; a config file records a call of it.

    Args:
      task: the objective over its model.
      optimizer: what updates the parameters.
      data: where batches come from.
      steps: optimizer steps in all.
      batch_size: examples per optimizer step, over all devices.
      layout: devices per mesh axis.
      precision: of the parameters between steps, and of products with them.
      microbatches: parts into which a batch is cut to save memory.
      trainable: regex over parameter paths; "" trains all of them.
      seed: of initialisation, data order and dropout.
      evals: evaluators by name; their metrics are reported as `name/metric`.
      eval_every: steps between evaluations, of which one always follows the last step; 0 for that
        one alone.
      save_every: steps between checkpoints, of which one always follows the last step.
      keep_last: how many of the newest checkpoints are kept.
      keep_every: checkpoints at multiples of it are kept for good; 0 for none.
      log_every: steps between lines of metrics.
      wandb_project: where not "", metrics also go to this Weights & Biases project.
    """

    task: Task
    optimizer: optax.GradientTransformation
    data: Dataset
    steps: int
    batch_size: int
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    microbatches: int = 1
    trainable: str = ""
    seed: int = 0
    evals: Mapping[str, Evaluator] = field(default_factory=dict)
    eval_every: int = 0
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    log_every: int = 10
    wandb_project: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "microbatches", "save_every", "keep_last", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} is {value}: must be at least 1.")
        for name in ("eval_every", "keep_every"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"{name} is {value}: must not be negative.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: must be from 0 to 2**32 - 1.")
        if self.batch_size % self.microbatches:
            raise UserError(
                f"batch_size {self.batch_size} is no multiple of microbatches {self.microbatches}."
            )
        if self.keep_every and self.keep_every % self.save_every:
            raise UserError(
                f"keep_every {self.keep_every} is no multiple of save_every {self.save_every}: "
                "nothing would be saved at the steps to be kept."
            )
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise UserError(f"trainable is no regular expression: {error}.") from error
        self.task.check(self.data)


class Interrupted(Exception):
    """The run was asked to stop, and has saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, which is saved"
        )
        self.exit_code = 128 + signum


class NonFinite(UserError):
    """The loss or the gradient is NaN or infinite; the state after it was not saved."""


@dataclass(kw_only=True)
class RunSession:
    """The `core.Session` of a run: its current state, seen by evaluators."""

    task: Task
    data: Dataset
    seed: int
    program: Program
    state: TrainState

    def variables(self) -> Variables:
        """The current variables; the optimizer's average of the parameters, where it keeps one."""
        average = optax.tree_utils.tree_get(self.state.opt_state, "averaged_params")
        return self.state.variables(average)

    @property
    def shards(self) -> tuple[int, int]:
        """Which part of a batch this process reads, of how many."""
        return distributed.local_rows(self.program.mesh)

    def eval_step(self, batch: Batch) -> dict[str, Mean]:
        """Metrics of a host batch, of which this process gives its rows."""
        return self.program.eval_step(self.variables(), self.program.put(batch))


def compile_run(run: Run, *, devices: Sequence[jax.Device] | None = None) -> Program:
    """Compiles the program of a run."""
    return draft_run(run, devices=devices).compile()


def draft_run(run: Run, *, devices: Sequence[jax.Device] | None = None) -> Draft:
    """Traces the program of a run, which `.compile()` of the result then compiles."""
    return draft_program(
        run.task,
        run.optimizer,
        run.layout,
        run.data.example,
        batch_size=run.batch_size,
        microbatches=run.microbatches,
        trainable=run.trainable,
        seed=run.seed,
        precision=run.precision,
        devices=devices,
    )


def train(
    run: Run,
    workdir: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    devices: Sequence[jax.Device] | None = None,
    quiet: bool = False,
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

    Raises:
      UserError: for a workdir of another run, a full disk, unreadable checkpoints.
      NonFinite: if the loss is no longer a number.
      Interrupted: after SIGINT or SIGTERM, once the state is saved.
    """
    started = time.perf_counter()
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
    about: dict[str, Any] = {"config": config or {}, "tokenizer": run.data.tokenizer.to_json()}
    _check_folder(workdir, about["config"])
    distributed.check_shared(workdir)
    program = compile_run(run, devices=devices)
    distributed.barrier()  # all have looked at the folder, and compiled
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(
            workdir / "checkpoints", keep_last=run.keep_last, keep_every=run.keep_every
        )
        stack.push(functools.partial(_close, checkpoints))
        state, first = _start(run, program, checkpoints, about)
        distributed.barrier()  # what made the state was compiled as well
        if jax.process_index() == 0:
            (workdir / "config.json").write_text(json.dumps(about["config"], indent=1) + "\n")
            (workdir / "tokenizer.json").write_text(about["tokenizer"])
        report = stack.enter_context(Report(run, program, workdir, first_step=first, quiet=quiet))
        report.start(time.perf_counter() - started)
        stop = stack.enter_context(signals())
        loop = _Loop(run, program, checkpoints, report, about, stop, state)
        loop.go(first)
        checkpoints.wait()
        return loop.session.state


class _Loop:
    """One pass from the first step to the last; holds what a step and the one before it share."""

    def __init__(
        self,
        run: Run,
        program: Program,
        checkpoints: Checkpoints,
        report: Report,
        about: Mapping[str, Any],
        stop: Stop,
        state: TrainState,
    ) -> None:
        self.run, self.program, self.checkpoints = run, program, checkpoints
        self.report, self.about, self.stop = report, about, stop
        self.session = RunSession(
            task=run.task, data=run.data, seed=run.seed, program=program, state=state
        )
        self.unread: tuple[int, dict[str, Mean], float] | None = None

    def go(self, first: int) -> None:
        """Runs steps first + 1 .. run.steps."""
        run, session = self.run, self.session
        shard, num_shards = session.shards
        batches = iter(
            run.data.batches(
                batch_size=run.batch_size,
                seed=run.seed,
                shard=shard,
                num_shards=num_shards,
                start=first,
            )
        )
        if first and self.due(first) and not self.report.evaluated(first):
            self.evaluate(first)  # a run that was stopped between saving and evaluating
        for step in range(first + 1, run.steps + 1):
            batch = self.program.put(next(batches))
            session.state, metrics = self.program.train_step(session.state, batch)
            dispatched = time.perf_counter()
            self.read()
            self.unread = step, metrics, dispatched
            last = step == run.steps
            if last or step % run.save_every == 0:
                self.save(step)
            if self.due(step) and not self.stop.after(step):
                self.evaluate(step)
            if self.stop.after(step):
                self.save(step)
                self.checkpoints.wait()
                raise Interrupted(self.stop.signum, step)

    def due(self, step: int) -> bool:
        """Whether an evaluation follows this step."""
        run = self.run
        return step == run.steps or bool(run.eval_every and step % run.eval_every == 0)

    def read(self) -> None:
        """Waits for the step before the one just dispatched; at most two are ever in flight."""
        if self.unread is None:
            return
        step, means, dispatched = self.unread
        self.unread = None
        values = {name: float(mean.value) for name, mean in jax.device_get(means).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            saved = self.checkpoints.steps()
            where = f"step {saved[-1]} is saved" if saved else "nothing is saved yet"
            raise NonFinite(
                f"the loss is {values['loss']} at step {step} "
                f"(gradient norm {values['grad_norm']:.3g}); "
                f"{where}. Lower the learning rate, lengthen the warm-up or clip the gradient."
            )
        self.report.step(step, values, dispatched)

    def evaluate(self, step: int) -> None:
        """Runs every evaluator on the state after `step`."""
        self.read()
        results: dict[str, float | str] = {}
        with self.report.pause():
            for name, evaluator in self.run.evals.items():
                found = evaluator(self.session)
                results.update({f"{name}/{key}": value for key, value in found.items()})
        self.report.evaluation(step, results)

    def save(self, step: int) -> None:
        """Starts a checkpoint of the state after `step`, whose loss has been seen to be finite."""
        self.read()
        with self.report.pause():
            self.checkpoints.save(
                step, self.session.state, {**self.about, "data": {"next_step": step}}
            )


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
    run: Run, program: Program, checkpoints: Checkpoints, about: Mapping[str, Any]
) -> tuple[TrainState, int]:
    """The state to go on from, and the number of steps that it has behind it."""

    def check(saved: Mapping[str, Any]) -> None:
        check_changes(checkpoints.directory.parent, saved["config"], about["config"])
        if saved["tokenizer"] != about["tokenizer"]:
            raise UserError(
                f"the tokenizer of this run's checkpoint ({checkpoints.directory}) is another than "
                "the one that the data gives now: the same ids would mean other text. Has the "
                "corpus changed? Use the old corpus, or another --workdir."
            )

    restored = checkpoints.restore(program.abstract_state, check)
    if restored is None:
        return program.init(), 0
    step, state, saved = restored
    if step > run.steps:
        raise UserError(
            f"{checkpoints.directory} is at step {step}, past steps = {run.steps}: nothing to do. "
            "Raise steps, or use another --workdir."
        )
    log.info("continuing from step %d", step)
    return state, int(saved["data"]["next_step"])


def _close(checkpoints: Checkpoints, kind: Any, error: Any, trace: Any) -> None:
    """Closes what was saved, unless this process alone fails: the others would not come to it."""
    del error, trace
    together = kind is None or issubclass(kind, Interrupted | NonFinite)
    if together or jax.process_count() == 1:
        checkpoints.close()
