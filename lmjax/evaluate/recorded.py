"""The evaluators that a run's config names, on one of its checkpoints."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lmjax.config import build, build_and_resolve, from_dict, load_config, override
from lmjax.core import Dataset, Evaluator, Task
from lmjax.engine.precision import Precision
from lmjax.engine.restored import restore
from lmjax.errors import UserError, did_you_mean
from lmjax.evaluate.losses import Losses
from lmjax.sharding import Layout, batch_ways

log = logging.getLogger("lmjax")

PARTS = ("task", "data", "evals", "layout", "precision", "seed", "batch_size")  # of a config


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a config says of a run that is to be evaluated; see `engine.run.Run`."""

    task: Task
    data: Dataset
    evals: Mapping[str, Evaluator]
    layout: Layout | None
    precision: Precision | None
    seed: int


def recorded(
    workdir: str | Path, *, config: str = "", overrides: Mapping[str, str] | None = None
) -> Recorded:
    """What the workdir's config.json says, with data and evals of `config` where that is given.

    Args:
      workdir: a run, or what `lmjax.convert` wrote.
      config: the folder of another run, or FILE.py[:VARIANT].
      overrides: dotted fields of the config, as flags give them.

    Raises:
      UserError: where there is no config, or it names no data, or has mistakes.
    """
    own, overrides = _tree(Path(workdir).expanduser()), dict(overrides or {})
    if config.partition(":")[0].endswith(".py"):
        _, given = build_and_resolve(load_config(config, overrides))
        overrides = {}
    else:
        given = _tree(Path(config).expanduser()) if config else own
    if "data" not in given or "task" not in own:
        raise UserError(
            f"config.json of {config or workdir} names no data: give --config=RUN, the folder of a "
            "run on such data, or --config=FILE.py."
        )
    parts = {name: given[name] for name in PARTS if name in given}
    # What speaks of the model that `given` has means that of the workdir.
    old, new = given["task"].get("model"), own["task"].get("model")
    parts = {name: _replaced(part, old, new) for name, part in parts.items()}
    node = from_dict({**parts, "task": own["task"]})
    for name, value in overrides.items():
        override(node, name, value)
    made = build(node)
    evals = made.get("evals") or _of_validation(made["data"], made.get("batch_size", 64))
    return Recorded(
        task=made["task"],
        data=made["data"],
        evals=evals,
        layout=made.get("layout"),
        precision=made.get("precision"),
        seed=made.get("seed", 0),
    )


def evaluate(
    run: Recorded,
    workdir: str | Path,
    *,
    folder: Path,
    step: int | None = None,
    only: Sequence[str] = (),
    devices: Sequence[jax.Device] | None = None,
) -> tuple[dict[str, dict[str, Any]], int]:
    """(what each evaluator finds of a checkpoint, its step).

    Args:
      run: what `recorded` gave.
      workdir: whose checkpoint.
      folder: where evaluators' files go.
      step: which checkpoint; the newest if not given.
      only: the evaluators by name; all if not given.
      devices: by default all. Where the run's layout does not divide them, they split the rows.

    Raises:
      UserError: as `engine.restored.restore`, and where an evaluator cannot run.
    """
    for name in only:
        if name not in run.evals:
            raise UserError(f"--evals names {name!r}." + did_you_mean(name, run.evals))
    layout = run.layout or Layout()
    try:
        layout.mesh(devices)
    except UserError as error:
        log.warning("the run's layout does not fit here, and the default is taken: %s", error)
        layout = Layout()
    ways = batch_ways(layout.mesh(devices))
    run.data.check()
    chosen = {name: e for name, e in run.evals.items() if name in only or not only}
    for evaluator in chosen.values():
        evaluator.check(run.task, run.data, ways=ways)
    session = restore(
        workdir,
        run.task,
        run.data,
        folder=folder,
        step=step,
        seed=run.seed,
        layout=layout,
        precision=run.precision,
        devices=devices,
    )
    return {name: dict(evaluator(session)) for name, evaluator in chosen.items()}, session.step


def _tree(workdir: Path) -> dict[str, Any]:
    """The config of a folder, plain."""
    path = workdir / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{workdir} holds no run: {path} cannot be read ({error}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("task"), dict):
        raise UserError(f"{path} records no task: it was not trained from a config.")
    return found


def _replaced(tree: Any, old: Any, new: Any) -> Any:
    """The tree with each of its parts that equals `old` replaced."""
    if old is not None and tree == old:
        return new
    if isinstance(tree, Mapping):
        return {key: _replaced(part, old, new) for key, part in tree.items()}
    return [_replaced(part, old, new) for part in tree] if isinstance(tree, list) else tree


def _of_validation(data: Any, batch_size: int) -> dict[str, Any]:
    """The loss on the validation split, which a module of data names `validation`."""
    split = getattr(sys.modules[type(data).__module__], "validation", None)
    if split is None:
        raise UserError(
            f"the config has no evals, and {type(data).__name__} no validation split: give "
            "--config=FILE.py, whose config has evals for this data."
        )
    return {"valid": Losses(data=split(data), batch_size=batch_size)}
