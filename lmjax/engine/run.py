"""A run: everything that defines it, as a config file records it, and its program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import optax

from lmjax.core import Dataset, Evaluator, Task
from lmjax.engine.guard import Guard
from lmjax.engine.precision import Precision
from lmjax.engine.program import Draft, Program, draft_program
from lmjax.engine.warm_start import Starts
from lmjax.engine.watchdog import Watch
from lmjax.errors import UserError, check_regex
from lmjax.sharding import Layout

MAX_STEPS = 2**31 - 2  # the state counts them in int32


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
      guard: which steps are bad, and what is done about them.
      watch: for how long the run may stand still, and what is warned of.
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
      init_from: where the parameters come from at step 0: a workdir or a checkpoint, 'hf:DIR' for a
        folder of Hugging Face's, or a `WarmStart` that says which of them, or several of these,
        each of which loads others; "" initialises all.
    """

    task: Task
    optimizer: optax.GradientTransformation
    data: Dataset
    steps: int
    batch_size: int
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    guard: Guard = field(default_factory=Guard)
    watch: Watch = field(default_factory=Watch)
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
    init_from: Starts = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "microbatches", "save_every", "keep_last", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} is {value}: must be at least 1.")
        for name in ("eval_every", "keep_every"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"{name} is {value}: must not be negative.")
        if self.steps > MAX_STEPS:
            raise UserError(f"steps is {self.steps}: must be at most {MAX_STEPS}.")
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
        check_regex("trainable", self.trainable)
        self.task.check(self.data)


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
        guard=run.guard,
        devices=devices,
    )
