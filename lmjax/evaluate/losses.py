"""The task's own loss and metrics on held-out data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from lmjax.core import Dataset, Session, Task
from lmjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The mean of every metric over a data set, each observation counted once.

    Args:
      data: what to evaluate on; gone through once, in order.
      batch_size: examples per evaluation step, over all devices.
      max_batches: stop after so many; 0 reads everything.
    """

    data: Dataset
    batch_size: int
    max_batches: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_batches < 0:
            raise UserError(
                f"batch_size is {self.batch_size} and max_batches {self.max_batches}: "
                "give at least 1 and at least 0."
            )

    def check(self, task: Task, data: Dataset, *, ways: int) -> None:
        """The task must be able to read this data too, in the same tokens."""
        if self.batch_size % ways:
            raise UserError(
                f"an evaluation's batch_size is {self.batch_size}, which does not divide into "
                f"{ways} data-parallel parts: make it a multiple of {ways}."
            )
        task.check(self.data)
        self.data.check()
        for name, text in data.fitted.items():
            if self.data.fitted.get(name) != text:
                raise UserError(f"the evaluation's data has another {name} than the training's.")

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """Numbers by the metric's name."""
        shard, num_shards = session.shards
        batches = self.data.epoch_batches(
            batch_size=self.batch_size, shard=shard, num_shards=num_shards
        )
        sums: dict[str, tuple[float, float]] = {}
        for batch in itertools.islice(batches, self.max_batches or None):
            # Reading each result keeps one step in flight, and sums in the host's double precision.
            for name, mean in jax.device_get(session.eval_step(batch)).items():
                total, weight = sums.get(name, (0.0, 0.0))
                sums[name] = total + float(mean.total), weight + float(mean.weight)
        # Of what never came (a class that is not in this data) there is no mean.
        return {name: total / weight for name, (total, weight) in sums.items() if weight}
