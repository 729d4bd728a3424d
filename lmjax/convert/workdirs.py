"""Workdirs made of others: a checkpoint read whole, and one written with another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lmjax.convert.imports import ORIGINAL
from lmjax.engine.stored import Stored, find, variables, verify
from lmjax.engine.streamed import write_checkpoint
from lmjax.errors import UserError

_PARAMS = "params/"
Blocks = Callable[[str], Iterator[tuple[tuple[int, ...], np.ndarray]]]


def check_empty(workdir: Path) -> None:
    """Raises UserError where a folder holds a run."""
    if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a run already: give another folder.")


def whole(workdir: Path, step: int | None) -> tuple[Stored, Mapping[str, Any], dict[str, str]]:
    """A checkpoint that is what was saved, its manifest, and where its parameters lie.

    Raises UserError where there is none, or it is damaged.
    """
    stored = find(workdir, step)[-1]
    if problems := verify(stored):
        raise UserError(f"the checkpoint {stored.folder} is damaged: {problems[0]}.")
    held = stored.manifest()
    lie = variables(held["arrays"])
    return stored, held, {k: path for k, path in lie.items() if k.startswith(_PARAMS)}


def read(stored: Stored, lie: Mapping[str, str], path: str) -> np.ndarray:
    """One parameter, by its path."""
    return np.asarray(stored.array(lie[f"{_PARAMS}{path}"]).read().result())


def read_all(stored: Stored, lie: Mapping[str, str]) -> dict[str, np.ndarray]:
    """All parameters by path."""
    return {k.removeprefix(_PARAMS): read(stored, lie, k.removeprefix(_PARAMS)) for k in lie}


def tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path as the model takes them."""
    return unflatten_dict({k: jnp.asarray(x) for k, x in flat.items()}, sep="/")


def shape_of(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """That of an array of a manifest."""
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))


def write_arrays(
    source: Path,
    workdir: Path,
    held: Mapping[str, Any],
    config: Mapping[str, Any],
    flat: Mapping[str, Any],
) -> None:
    """`write` of parameters by path; what the checkpoint has beside them stays as it is."""
    arrays = {f"{_PARAMS}{path}": np.asarray(x) for path, x in flat.items()}
    lie = variables(held["arrays"])
    stored = find(source, held["step"])[-1]
    for name, path in lie.items():
        if not name.startswith(_PARAMS):
            arrays[f"model_state/{name}"] = np.asarray(stored.array(path).read().result())
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}

    def blocks(name: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        yield (0,) * arrays[name].ndim, np.ascontiguousarray(arrays[name])

    write(source, workdir, held, config, shapes, blocks)


def write(
    source: Path,
    workdir: Path,
    held: Mapping[str, Any],
    config: Mapping[str, Any],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    blocks: Blocks,
) -> None:
    """A workdir of step 0 whose checkpoint holds these arrays.

    Args:
      source: the workdir that it is made of, whose other files are copied.
      held: the manifest of that one's checkpoint.
      config: what the new one records, see `with_model`.
      shapes: of the arrays, by their paths in a state.
      blocks: the numbers of one of them: (where, block).
    """
    fitted = [name for name in held.get("fitted", ["tokenizer"]) if name in held]
    about = {
        "config": config,
        **{name: held[name] for name in fitted},
        "fitted": fitted,
        "fingerprint": "",
        "data": {"next_batch": 0, "left_out": []},
        "source": {"workdir": source.absolute().name, "step": held["step"]},
    }
    write_checkpoint(workdir / "checkpoints", 0, shapes, blocks, about)
    if (source / ORIGINAL).is_dir():
        shutil.copytree(source / ORIGINAL, workdir / ORIGINAL)
    for name in fitted:
        (workdir / f"{name}.json").write_text(held[name], "utf-8")
    (workdir / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def with_model(held: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The task of a manifest's config, of another model: all that a model of text needs."""
    return {"task": {**held["config"]["task"], "model": model}}
