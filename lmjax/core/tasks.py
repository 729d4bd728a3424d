"""What objectives and evaluators honour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from lmjax.core.data import Dataset
from lmjax.core.values import Batch, Mean, Output, Spec, Variables, Work


@runtime_checkable
class Task(Protocol):
    """An objective over one or more networks: pure, ignorant of meshes, optimizers and files.

    One whose reported loss has a unit names it in the attribute `loss_unit` ("nats").
    """

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the variables, each parameter boxed with its axes' names (`sharding.param`)."""
        ...

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """Computes the loss of a batch; totals, not means, so that microbatches add."""
        ...

    def check(self, data: Dataset) -> None:
        """Raises UserError where it cannot read that data; called before any device is used."""
        ...

    def work(self, example: Spec) -> Work:
        """What one example costs to train on."""
        ...

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part of the model, as papers count them (no padding)."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """A task that says something of every single row too."""

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Arrays with a row for each of the batch's, named with their shape ("scores_BC")."""
        ...


class Evaluator(Protocol):
    """Measures the current parameters now and then; numbers are metrics, strings samples."""

    def check(self, task: Task, data: Dataset, *, ways: int) -> None:
        """Raises UserError where it cannot run on this task, trained on that data.

        The rows of its batches will be split into `ways` parts.
        """
        ...

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """Evaluates; may use the devices."""
        ...


class Session(Protocol):
    """What the engine hands to an evaluator."""

    task: Task
    data: Dataset
    seed: int

    def variables(self) -> Variables:
        """The current variables, with the averaged parameters where the optimizer keeps them."""
        ...

    @property
    def shards(self) -> tuple[int, int]:
        """(shard, num_shards) of a global batch that this process reads."""
        ...

    def eval_step(self, batch: Batch) -> dict[str, Mean]:
        """Metrics (the loss among them) of a global batch, of which this process gives its rows.

        Compiled once per shape.
        """
        ...

    def predict(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """What the task says of each row of a global batch, whole, on every process.

        Of a batch this process gives its rows. Compiled once per shape; raises UserError where the
        task is none that `Predicts`.
        """
        ...

    def keep(self, name: str, content: bytes) -> None:
        """Keeps a file of this name in the run's folder, in the place of an older one."""
        ...
