"""What evaluators see of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax

from lmjax.core import Batch, Dataset, Mean, Task, Variables
from lmjax.engine import distributed
from lmjax.engine.goodput import Goodput
from lmjax.engine.program import Program
from lmjax.engine.state import TrainState
from lmjax.engine.stop import Stop


class Stopping(Exception):
    """Leaves an evaluation, as the run was asked to stop; a resume makes it."""


@dataclass(kw_only=True)
class RunSession:
    """The `core.Session` of a run: its current state, seen by evaluators."""

    task: Task
    data: Dataset
    seed: int
    program: Program
    state: TrainState
    workdir: Path | None = None
    clock: Goodput = field(default_factory=Goodput)
    stop: Stop = field(default_factory=Stop)

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
        self._beat()
        return self.program.eval_step(self.variables(), self.program.put(batch))

    def predict(self, batch: Batch) -> dict[str, Any]:
        """What the task says of each row of a global batch, whole, on every process (numpy)."""
        self._beat()
        found: dict[str, Any] = jax.device_get(
            self.program.predict(self.variables(), self.program.put(batch))
        )
        return found

    def keep(self, name: str, content: bytes) -> None:
        """Writes a file of this name into the run's folder, if it has one; one process does."""
        if self.workdir is not None and jax.process_index() == 0:
            (self.workdir / name).write_bytes(content)

    def _beat(self) -> None:
        self.clock.beat()
        if self.stop.asked():
            raise Stopping
