"""The bad steps of a run: what is kept of them for a replay, and which batches are left out since.

`incidents.jsonl` in the workdir has a line for each; `incidents/STEP` is a checkpoint of the state
before step STEP + 1, bit for bit, where the policy is to stop or to roll back, and
`incidents/batch-STEP-PROCESS.npz` holds the rows of that step's batch which a process read.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.core import Batch
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.guard import WATCHED, Guard
from lmjax.engine.lines import append_line, read_lines
from lmjax.engine.state import TrainState
from lmjax.errors import UserError

FILE, FOLDER = "incidents.jsonl", "incidents"
KEEP_STATES = 2


def batch_of(step: int, left_out: Collection[int]) -> int:
    """The number of the global batch, from 0, that step `step`, from 1, trains on."""
    batch = step - 1
    for missing in sorted(left_out):
        batch += missing <= batch
    return batch


def read_incidents(workdir: str | Path) -> list[dict[str, Any]]:
    """What `incidents.jsonl` holds; a line that a kill cut short is no incident.

    Raises UserError where a line is damaged: the batch that it left out would come again.
    """
    path, found = Path(workdir) / FILE, []
    wanted = {"step": int, "batch": int, "policy": str, "left_out": list}
    for number, row in enumerate(read_lines(path), 1):
        if row is None or any(type(row.get(name)) is not kind for name, kind in wanted.items()):
            raise UserError(
                f"line {number} of {path} is damaged, and it may name a batch that is to be left "
                "out. Give the file back from a copy, or remove the line if its policy was not "
                "'rollback'."
            )
        found.append(row)
    return found


def batches_left_out(workdir: str | Path) -> frozenset[int]:
    """The batches that rollbacks left out of the run so far."""
    return frozenset(row["batch"] for row in read_incidents(workdir) if row["policy"] == "rollback")


class Incidents:
    """Keeps the last steps' metrics, and what is needed to run a bad step again."""

    def __init__(self, workdir: Path, guard: Guard, *, seed: int) -> None:
        self.workdir, self.guard, self.seed = workdir, guard, seed
        self.left_out = batches_left_out(workdir)
        self.count = len(read_incidents(workdir))
        self._recent: collections.deque[dict[str, float]] = collections.deque(maxlen=guard.window)

    def good(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a good step."""
        row = {name: values[name] for name in WATCHED}
        self._recent.append({"step": step, "batch": batch_of(step, self.left_out), **row})

    def bad(self, step: int, values: Mapping[str, float]) -> str:
        """Writes the line of a bad step; returns why it is bad."""
        medians = {
            name: statistics.median(row[name] for row in self._recent)
            for name in WATCHED
            if self._recent
        }
        reason = self.guard.reason(values, medians)
        batch = batch_of(step, self.left_out)
        self.count += 1
        line = {
            "step": step,
            "batch": batch,
            "reason": reason,
            "policy": self.guard.policy,
            "rng": {"seed": self.seed, "fold_in": step - 1},
            "metrics": {name: _plain(value) for name, value in values.items()},
            "recent": list(self._recent),
            "left_out": sorted(self.left_out),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if jax.process_index() == 0:
            append_line(self.workdir / FILE, line)
        if self.guard.policy == "rollback":
            self.left_out |= {batch}
            self._recent.clear()
        return reason

    def keep(self, step: int, state: TrainState, batch: Batch, about: Mapping[str, Any]) -> None:
        """Writes what `lmjax.replay` needs of a bad step, whose update was not applied.

        Args:
          step: the bad one.
          state: after it, or after a later one; no update was applied since.
          batch: the rows of it that this process read.
          about: as of a checkpoint.
        """
        folder = self.workdir / FOLDER
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"batch-{step}-{jax.process_index()}.npz", **batch)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        rewound = jax.jit(_rewound, static_argnums=1, donate_argnums=0, out_shardings=shardings)
        states = Checkpoints(folder, keep_last=KEEP_STATES)
        states.save(step - 1, rewound(state, step - 1), about)
        states.close()


def _rewound(state: TrainState, step: int) -> TrainState:
    memory = {**state.guard, "halted": jnp.zeros((), bool)}
    return replace(state, step=jnp.full((), step, state.step.dtype), guard=memory)


def _plain(value: float) -> float | str:
    """A number that JSON has, or the name of one that it has not."""
    return value if np.isfinite(value) else str(value)
