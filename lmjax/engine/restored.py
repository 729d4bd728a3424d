"""A run that is over, as evaluators see it: a checkpoint's variables on devices again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lmjax import sharding
from lmjax.core import CARRY, Batch, Dataset, Mean, Spec, Task, Variables
from lmjax.engine import distributed, manifest
from lmjax.engine.manifest import Damaged
from lmjax.engine.precision import Precision
from lmjax.engine.program import Reading, reading_of
from lmjax.engine.stored import Stored, find, variables
from lmjax.errors import UserError
from lmjax.sharding import Layout

_LISTED = 6  # of what does not fit, at most


@dataclass(kw_only=True)
class RestoredSession:
    """The `core.Session` of a checkpoint.

    Args:
      task: the objective, whose variables these are.
      data: what it was trained on.
      seed: of what is drawn in an evaluation.
      step: of the checkpoint.
      mesh: the devices.
      reading: what reads the variables.
      held: the variables, with the averaged parameters where the optimizer kept them.
      folder: where evaluators' files go.
    """

    task: Task
    data: Dataset
    seed: int
    step: int
    mesh: Mesh
    reading: Reading
    held: Variables
    folder: Path

    def variables(self) -> Variables:
        """Those of the checkpoint."""
        return self.held

    @property
    def shards(self) -> tuple[int, int]:
        """Which part of a batch this process reads, of how many."""
        return distributed.local_rows(self.mesh)

    def eval_step(self, batch: Batch) -> dict[str, Mean]:
        """Metrics of a host batch, of which this process gives its rows."""
        return self.reading.eval_step(self.held, self.reading.put(batch))

    def predict(self, batch: Batch) -> dict[str, Any]:
        """What the task says of each row of a global batch, whole, on every process (numpy)."""
        found: dict[str, Any] = jax.device_get(
            self.reading.predict(self.held, self.reading.put(batch))
        )
        return found

    def keep(self, name: str, content: bytes) -> None:
        """Writes a file of this name into the folder; one process does."""
        if jax.process_index() == 0:
            (self.folder / name).write_bytes(content)


def restore(
    workdir: str | Path,
    task: Task,
    data: Dataset,
    *,
    folder: Path,
    step: int | None = None,
    seed: int = 0,
    layout: Layout | None = None,
    precision: Precision | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> RestoredSession:
    """The session of a checkpoint in `workdir`.

    Args:
      workdir: a run, or what `lmjax.convert` wrote.
      task: as it was trained; of its variables the checkpoint may hold no others.
      data: as it was trained on, which is checked by what it learned of itself (`Dataset.fitted`).
      folder: where evaluators' files go.
      step: of the checkpoint; the newest if not given.
      seed: of the session.
      layout: devices per mesh axis.
      precision: of products; the parameters lie as they were saved.
      devices: by default all.

    Raises:
      UserError: where there is no such checkpoint, it is damaged, or is one of another task or of
        other data.
    """
    stored = find(workdir, step)[-1]
    layout = layout or Layout()
    mesh = layout.mesh(devices)
    try:
        saved = stored.manifest()
        for name, text in data.fitted.items():
            if saved.get(name) != text:
                raise UserError(
                    f"the {name} of {stored.folder} is another than the data gives now: the same "
                    "numbers would mean something else. Use the data that it was trained on."
                )
        held = _read(stored, saved, task, data.example, mesh)
    except Damaged as error:
        raise UserError(f"the checkpoint {stored.folder} is damaged: {error}.") from error
    return RestoredSession(
        task=task,
        data=data,
        seed=seed,
        step=int(saved["step"]),
        mesh=mesh,
        reading=reading_of(task, mesh, layout, precision or Precision()),
        held=held,
        folder=folder,
    )


def _read(
    stored: Stored, saved: Mapping[str, Any], task: Task, example: Spec, mesh: Mesh
) -> Variables:
    """All variables of the task but what rows carry, each split as its names say."""
    batch = {k: jnp.zeros((1, *v.shape), v.dtype) for k, v in example.items()}
    made = dict(jax.eval_shape(lambda: task.init(jax.random.key(0), batch)))
    made.pop(CARRY, None)
    shardings = flatten_dict(sharding.shardings_of(made, mesh), sep="/")
    wanted = flatten_dict(sharding.unbox(made), sep="/")
    lie = variables(saved["arrays"], aside=True)
    wrong = [f"it has no {name}" for name in wanted if name not in lie]
    for name in wanted.keys() & lie.keys():
        shape = tuple(saved["arrays"][lie[name]]["shape"])
        if shape != wanted[name].shape:
            wrong.append(f"{name} is {list(shape)}, and the task's {list(wanted[name].shape)}")
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise UserError(
            f"{stored.folder} is no checkpoint of this task: {'; '.join(sorted(wrong)[:_LISTED])}"
            f"{more}."
        )
    arrays = {lie[n]: manifest.abstract(saved, lie[n], shardings[n]) for n in wanted}
    found = stored.read(arrays)
    if bad := manifest.damaged(saved, found):
        raise Damaged(f"not what was saved, by their checksums: {', '.join(bad[:_LISTED])}")
    return unflatten_dict({name: found[lie[name]] for name in wanted}, sep="/")
