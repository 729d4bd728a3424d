"""Adapters in and out of workdirs: joined to a base, split off as a folder of peft's, merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.adapt.adalora import AdaLora
from lmjax.adapt.adapted import Adapted, Adapter, adapted
from lmjax.adapt.ia3 import Ia3
from lmjax.adapt.lora import Lora
from lmjax.config import build, call, from_dict, to_dict
from lmjax.convert import peft
from lmjax.convert.exports import described
from lmjax.convert.imports import ORIGINAL
from lmjax.convert.places import EXAMPLE, Place, places_of
from lmjax.convert.settings import Settings
from lmjax.engine.stored import Stored, find, variables, verify
from lmjax.engine.streamed import write_checkpoint
from lmjax.errors import UserError
from lmjax.models.saved import recorded_model


def import_adapter(source: Path, base: Path, workdir: Path, *, step: int | None = None) -> Adapter:
    """Writes a workdir of a base with an adapter of peft's, which everything reads as a run's.

    Args:
      source: a folder with adapter_config.json and adapter_model.safetensors.
      base: workdir of the weights that it was trained on.
      workdir: is made; may not hold a run.
      step: which checkpoint of the base; the newest if not given.

    Raises:
      UserError: as `peft.read_adapter`; where the base is not the one that the adapter was exported
        with, has adapters, or is damaged; where the workdir holds a run.
    """
    _check_empty(workdir)
    stored, held, lie = _whole(base, step)
    node = to_dict(recorded_model(base))
    model = build(from_dict(node))
    if isinstance(model, Adapted):
        raise UserError(f"{base} has adapters already: merge them first.")
    places = _places(model)

    def kernel(path: str) -> np.ndarray:
        return _read(stored, lie, f"{path}/kernel")

    adapter, arrays = peft.read_adapter(source, places, kernel)
    tuned = adapted(model=model, adapters=(adapter,)).sites(EXAMPLE)[adapter.name]
    about = source / peft.ABOUT
    if about.is_file() and (wanted := json.loads(about.read_text()).get("base")):
        found = peft.fingerprint(stored, lie, list(tuned))
        if found != wanted:
            raise UserError(
                f"{source} is an adapter of another base: the kernels that it tunes have the hash "
                f"{wanted[:12]} there and {found[:12]} in {base}. Give the base that it was "
                "trained on."
            )
    recorded = call(adapted, model=from_dict(node), adapters=(_recorded(adapter),))
    _check_shapes(build(recorded), stored, held, lie, arrays)

    def blocks(name: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        path = name.removeprefix("params/")
        if path in arrays:
            yield (0,) * arrays[path].ndim, np.ascontiguousarray(arrays[path])
        else:
            yield from stored.blocks(lie[name])

    shapes = {name: _shape(held["arrays"][path]) for name, path in lie.items()}
    shapes |= {f"params/{k}": jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
    _write(base, workdir, held, to_dict(recorded), shapes, blocks)
    return adapter


def export_adapter(workdir: Path, to: Path, *, step: int | None = None) -> str:
    """Writes the adapter of a run as a folder that `peft` loads on the exported base; its name.

    Raises:
      UserError: where the run has no adapter or several, or one that peft does not know; where
        `to` holds an adapter.
    """
    if (to / peft.CONFIG).exists():
        raise UserError(f"{to} holds an adapter already: give another --to.")
    stored, _, lie = _whole(workdir, step)
    model = _adapted(workdir)
    places = _places(model.model)
    tuned = {path for sites in model.sites(EXAMPLE).values() for path in sites}
    wanted = {f"{path}/kernel" for path in tuned}
    names = {adapter.name for adapter in model.adapters}
    paths = [name.removeprefix("params/") for name in lie]
    params = {
        path: _read(stored, lie, path)
        for path in paths
        if path in wanted or path.split("/")[-2] in names
    }
    base = peft.fingerprint(stored, lie, sorted(tuned))
    causal = hasattr(model, "init_cache")
    peft.write_adapter(to, model, params, places, causal=causal, base=base)
    return model.adapters[0].name


def merge(workdir: Path, to: Path, *, step: int | None = None) -> None:
    """Writes a workdir of a run's model without its adapters, whose kernels hold what they did.

    Raises:
      UserError: where the run has no adapters, or one that is no linear function; where `to` holds
        a run.
    """
    _check_empty(to)
    stored, held, lie = _whole(workdir, step)
    model = _adapted(workdir)
    read = {name.removeprefix("params/"): _read(stored, lie, name[7:]) for name in lie}
    params = unflatten_dict({k: jnp.asarray(x) for k, x in read.items()}, sep="/")
    merged = flatten_dict(model.merged(params, EXAMPLE), sep="/")
    arrays = {path: np.asarray(x).astype(read[path].dtype) for path, x in merged.items()}
    shapes = {f"params/{k}": jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
    node = to_dict(recorded_model(workdir))["model"]

    def blocks(name: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        x = arrays[name.removeprefix("params/")]
        yield (0,) * x.ndim, np.ascontiguousarray(x)

    _write(workdir, to, held, node, shapes, blocks)


def _recorded(adapter: Adapter) -> Any:
    """The recorded call of an adapter."""
    assert isinstance(adapter, Lora | AdaLora | Ia3)
    return call(type(adapter), **vars(adapter))


def _adapted(workdir: Path) -> Adapted:
    model = build(recorded_model(workdir))
    if not isinstance(model, Adapted):
        raise UserError(f"{workdir} has no adapters: its model is a {type(model).__name__}.")
    return model


def _places(model: Any) -> dict[str, Place]:
    family, fields = described(model)
    return places_of(model, family.parts(Settings("the model", fields)))


def _whole(workdir: Path, step: int | None) -> tuple[Stored, Mapping[str, Any], dict[str, str]]:
    """A checkpoint that is what was saved, its manifest, and where its parameters lie."""
    stored = find(workdir, step)[-1]
    if problems := verify(stored):
        raise UserError(f"the checkpoint {stored.folder} is damaged: {problems[0]}.")
    held = stored.manifest()
    lie = variables(held["arrays"])
    return stored, held, {k: path for k, path in lie.items() if k.startswith("params/")}


def _read(stored: Stored, lie: Mapping[str, str], path: str) -> np.ndarray:
    return np.asarray(stored.array(lie[f"params/{path}"]).read().result())


def _shape(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))


def _check_empty(workdir: Path) -> None:
    if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a run already: give another folder.")


def _check_shapes(
    model: Adapted,
    stored: Stored,
    held: Mapping[str, Any],
    lie: Mapping[str, str],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Raises UserError where the base and the adapter do not make up the model."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    made = jax.eval_shape(model.init, key, EXAMPLE)["params"]
    shapes = {k: tuple(x.value.shape) for k, x in flatten_dict(made, sep="/", is_leaf=_box).items()}
    given = {k[7:]: tuple(held["arrays"][path]["shape"]) for k, path in lie.items()}
    given |= {path: x.shape for path, x in arrays.items()}
    for path in sorted(shapes.keys() | given.keys()):
        if shapes.get(path) != given.get(path):
            raise UserError(
                f"{stored.folder} and the adapter give {path} the shape {given.get(path)}, and the "
                f"model has {shapes.get(path)}: it is an adapter of another base."
            )


def _box(_: Any, x: Any) -> bool:
    return not isinstance(x, dict)


def _write(
    source: Path,
    workdir: Path,
    held: Mapping[str, Any],
    model: Any,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    blocks: Any,
) -> None:
    """A workdir of step 0 that differs from another one in its model."""
    task = {**held["config"]["task"], "model": model}
    about = {
        "config": {"task": task},
        "tokenizer": held["tokenizer"],
        "fingerprint": "",
        "data": {"next_batch": 0, "left_out": []},
        "source": {"workdir": source.absolute().name, "step": held["step"]},
    }
    write_checkpoint(workdir / "checkpoints", 0, shapes, blocks, about)
    if (source / ORIGINAL).is_dir():
        shutil.copytree(source / ORIGINAL, workdir / ORIGINAL)
    (workdir / "tokenizer.json").write_text(held["tokenizer"], "utf-8")
    (workdir / "config.json").write_text(json.dumps(about["config"], indent=1) + "\n", "utf-8")
