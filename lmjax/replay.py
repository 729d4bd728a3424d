"""`python -m lmjax.replay --workdir=DIR --step=S`: runs a step again and names what is not finite.

The state before step S is that of the incident, where the run kept one, else the newest checkpoint
before it, from which the steps between are run as in training. Then step S runs in float32,
products too, on one device (which must hold the state), and the first parameter, batch array or
equation whose numbers are not finite is named, with its module, layer and line of code. Needs the
data of the run and writes nothing. A step that is finite in float32 and was not in training lacked
precision or range: `--as_trained` shows where.

Exit codes: 0 all is finite; 2 a bad flag or folder; 3 something is not finite.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lmjax.annotations import shown
from lmjax.config import build, from_dict
from lmjax.core import Batch, Dataset
from lmjax.engine import warm_start
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.finding import Finding
from lmjax.engine.guard import Guard
from lmjax.engine.incidents import FOLDER, batch_of, batches_left_out, read_incidents
from lmjax.engine.nonfinite import evaluate
from lmjax.engine.precision import widen
from lmjax.engine.program import Draft
from lmjax.engine.run import Run, draft_run
from lmjax.engine.state import TrainState, paths_of
from lmjax.errors import Exit, UserError
from lmjax.flags import fail, parse_flags, speak
from lmjax.hardware import prepare
from lmjax.sharding import Layout

log = logging.getLogger("lmjax")


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a step that ran again gave.

    Args:
      step: which one, from 1.
      batch: the number of the global batch that it trained on, from 0.
      start: where its state came from.
      precision: in which it ran.
      metrics: what it reported, the loss and `grad_norm` among it.
      finding: what is not finite first; None where everything is finite.
    """

    step: int
    batch: int
    start: str
    precision: str
    metrics: Mapping[str, float]
    finding: Finding | None

    @property
    def finite(self) -> bool:
        """Whether nothing was found, and the loss and the gradient norm are finite."""
        watched = self.metrics["loss"], self.metrics["grad_norm"]
        return self.finding is None and all(map(math.isfinite, watched))

    def __str__(self) -> str:
        """The report, a few lines."""
        metrics = self.metrics
        lines = [
            f"step {self.step}, batch {self.batch}, from {self.start}, in {self.precision}",
            f"loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}",
        ]
        if self.finding:
            lines.append(f"not finite first: {self.finding}")
        elif self.finite:
            lines.append("all that the step computes from it is finite")
        else:
            lines.append("no equation was found that makes it so")
        return "\n".join(lines)


def replay(
    workdir: str | Path,
    step: int | None = None,
    *,
    as_trained: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Replayed:
    """Runs a step of a run again, equation by equation where that is needed.

    Args:
      workdir: the run's folder.
      step: which, from 1; by default the last one that was bad.
      as_trained: in the dtypes of the run; else parameters, activations and products are float32.
      devices: that the steps before may use, as in training where the run's layout fits them; the
        step itself runs on the first one. By default all.

    Raises:
      UserError: for a folder without such a run, a step that it has not reached, unreadable
        checkpoints, data that has changed.
    """
    workdir = Path(workdir)
    tree = _config(workdir)
    run = build(from_dict(tree))
    if not isinstance(run, Run):
        raise UserError(f"{workdir} holds no run: its config.json gives {shown(run)}.")
    incidents = read_incidents(workdir)
    if step is None:
        if not incidents:
            raise UserError(f"{workdir} has no incidents: name a step, as --step=100.")
        step = int(incidents[-1]["step"])
    if step < 1:
        raise UserError(f"--step is {step}: steps count from 1.")
    # A rollback leaves out a batch for what comes after it; the bad step itself had that batch.
    known = [row for row in incidents if row["step"] == step]
    left_out = frozenset(known[-1]["left_out"]) if known else batches_left_out(workdir)
    run.data.check()
    devices = jax.devices() if devices is None else devices
    state, start = _state_before(run, workdir, step, left_out, devices)

    again: Run = run if as_trained else build(from_dict(_in_float32(tree)))
    again = replace(again, guard=Guard(), layout=Layout())
    with jax.default_matmul_precision(None if as_trained else "highest"):
        draft = draft_run(again, devices=devices[:1])
    if not as_trained:
        kept = widen(run.precision, state.params, state.frozen, state.opt_state)
        state = replace(state, params=kept[0], frozen=kept[1], opt_state=kept[2])
    # Of no use without a rule for spikes, and NaN on purpose.
    memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), draft.abstract_state.guard)
    state = replace(state, guard=memory)
    number = batch_of(step, left_out)
    given = jax.device_put(
        (state, _batch(run, workdir, step, number)),
        jax.tree.map(lambda x: x.sharding, (draft.abstract_state, draft.abstract_batch)),
    )
    del state
    outputs, finding = evaluate(draft.jaxpr, jax.tree.leaves(given), _names(given))
    shapes, structure = jax.tree.flatten(draft.abstract_metrics)
    means = jax.tree.unflatten(structure, outputs[-len(shapes) :])
    return Replayed(
        step=step,
        batch=number,
        start=start,
        precision="the precision of the run" if as_trained else "float32",
        metrics={name: float(mean.value) for name, mean in means.items()},
        finding=_with_layer(finding, again) if finding else None,
    )


def _config(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no run: there is no {path}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}.") from error
    if not isinstance(tree, dict) or "task" not in tree:
        raise UserError(f"{path} has no task: the run was not made from a config.")
    return tree


def _in_float32(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The config with float32 for every `dtype` of the task, for parameters and for products."""

    def convert(node: Any) -> Any:
        if isinstance(node, list):
            return [convert(item) for item in node]
        if not isinstance(node, Mapping):
            return node
        return {
            key: "float32" if key == "dtype" and isinstance(item, str) else convert(item)
            for key, item in node.items()
        }

    changed = {**tree, "task": convert(tree["task"])}
    if isinstance(tree.get("precision"), Mapping):
        changed["precision"] = {**tree["precision"], "params": "float32", "products": "default"}
    return changed


def _state_before(
    run: Run, workdir: Path, step: int, left_out: frozenset[int], devices: Sequence[jax.Device]
) -> tuple[TrainState, str]:
    """The state before a step, and in words where it comes from."""
    if step > run.steps:
        raise UserError(f"--step is {step}, and the run has {run.steps} steps.")
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir} has no checkpoints: there is nothing to start from.")
    kept = workdir / FOLDER
    if (kept / str(step - 1)).is_dir():
        try:
            return _from_folder(run, kept, step, left_out, devices)
        except UserError as error:
            log.warning("%s Going on from the checkpoints.", error)
    return _from_folder(run, folder, step, left_out, devices)


def _from_folder(
    run: Run, folder: Path, step: int, left_out: frozenset[int], devices: Sequence[jax.Device]
) -> tuple[TrainState, str]:
    checkpoints = Checkpoints(folder)
    try:
        earlier = [saved for saved in checkpoints.steps() if saved < step]
        exact = earlier[-1:] == [step - 1]
        draft = _draft(run, devices[:1] if exact else devices)
        # An incident has its own rows, if one process read them all, and needs no data.
        alone = exact and folder.name == FOLDER and _kept(run, folder.parent, step) is not None

        def check(saved: Mapping[str, Any]) -> None:
            if not alone:
                _check(run.data, saved, folder)

        restored = earlier and checkpoints.restore(draft.abstract_state, check, at_most=step - 1)
    finally:
        checkpoints.close()
    if restored and restored[0] == step - 1:
        return restored[1], f"{folder.name}/{step - 1}"
    program = draft.compile()
    first, came_from = (restored[0], f"{folder.name}/{restored[0]}") if restored else (0, "step 0")
    if restored:
        state = restored[1]
    else:
        state = warm_start.start(run.init_from, run, program) if run.init_from else program.init()
    log.info("running steps %d to %d from %s", first + 1, step - 1, came_from)
    for _, batch in zip(range(first + 1, step), _batches(run, first, left_out), strict=False):
        state, _ = program.train_step(state, program.put(batch))
    return state, f"{came_from} and {step - 1 - first} steps"


def _draft(run: Run, devices: Sequence[jax.Device]) -> Draft:
    """The program of the run in its layout; on one device where that does not fit."""
    if len(devices) > 1:
        try:
            return draft_run(run, devices=devices)
        except UserError as error:
            log.warning("the steps before run on one device: %s", error)
    return draft_run(replace(run, layout=Layout()), devices=devices[:1])


def _check(data: Dataset, saved: Mapping[str, Any], folder: Path) -> None:
    now = {**data.fitted, "fingerprint": data.fingerprint}
    if changed := [name for name, value in now.items() if saved.get(name, value) != value]:
        raise UserError(
            f"the {' and the '.join(changed)} of the data that the checkpoints in {folder} were "
            "trained on is another than the data's now: the batch would be another one. Has the "
            "corpus changed? Use the old one."
        )


def _batches(run: Run, first: int, left_out: frozenset[int]) -> Iterator[Batch]:
    """The whole batches of steps first + 1, first + 2, ..."""
    start = batch_of(first + 1, left_out)
    read = run.data.batches(batch_size=run.batch_size, seed=run.seed, start=start)
    return (batch for number, batch in enumerate(read, start) if number not in left_out)


def _batch(run: Run, workdir: Path, step: int, number: int) -> Batch:
    """The batch of the data; where the incident kept another one whole, that, with a warning."""
    batch = next(iter(run.data.batches(batch_size=run.batch_size, seed=run.seed, start=number)))
    kept = _kept(run, workdir, step)
    if kept is None or _same(kept, batch):
        return batch
    log.warning(
        "the rows of step %d that were kept are not what the data gives now: they run", step
    )
    return kept


def _kept(run: Run, workdir: Path, step: int) -> Batch | None:
    """The batch of a bad step as the run kept it, where one process had all of its rows."""
    path = workdir / FOLDER / f"batch-{step}-0.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            rows = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read, and the rows are the data's: %s", path, error)
        return None
    return rows if all(len(x) == run.batch_size for x in rows.values()) else None


def _same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(x, other[name], equal_nan=x.dtype.kind == "f") for name, x in one.items()
    )


def _names(given: tuple[TrainState, Batch]) -> list[str]:
    """Names of the step's arrays: 'params/...', 'opt_state/...', 'batch/tokens'."""
    leaves = jax.tree_util.tree_flatten_with_path(given)[0]
    return [
        "batch/" * (path[0].idx == 1) + jax.tree_util.keystr(path[1:], simple=True, separator="/")
        for path, _ in leaves
    ]


def _with_layer(finding: Finding, run: Run) -> Finding:
    """The finding, with the layer where it is a parameter of a stack, or a moment of one."""
    batch = {k: jnp.zeros((1, *v.shape), v.dtype) for k, v in run.data.example.items()}
    boxed = jax.eval_shape(run.task.init, jax.random.key(0), batch)["params"]
    for path, box in paths_of(boxed).items():
        if f"/{finding.array}".endswith(f"/{path}") and box.axes[:1] == ("layers",):
            return dataclasses.replace(finding, layer_of_input=finding.index[0])
    return finding


def command() -> None:
    """Reads the flags, prints the report, exits."""
    workdir = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    step = flags.DEFINE_integer("step", None, "which step, from 1; the last bad one if not given")
    as_trained = flags.DEFINE_bool("as_trained", False, "keep the dtypes of the run")
    num_devices = flags.DEFINE_integer(
        "devices",
        0,
        "how many devices the CPU shows as; 0 for one",
        lower_bound=0,
        upper_bound=4096,
    )

    def main(argv: list[str]) -> None:
        speak()
        prepare(devices=num_devices.value)
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
            found = replay(workdir.value, step.value, as_trained=as_trained.value)
        except (UserError, OSError) as error:
            fail(error, Exit.USAGE)
        print(found)
        if found.finite:
            if not as_trained.value:
                print("If it was not in training, see where: --as_trained.")
            return
        print(f"Its rows: python -m lmjax.data --config=... --batch={found.batch}")
        sys.exit(Exit.NOT_FINITE)

    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    command()
