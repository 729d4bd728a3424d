"""Adapters in and out of workdirs: joined to a base, split off as a folder of peft's, merged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from lmjax.adapt.adalora import AdaLora
from lmjax.adapt.adapted import Adapted, Adapter, adapted
from lmjax.adapt.ia3 import Ia3
from lmjax.adapt.lora import Lora
from lmjax.adapt.quantized import Quantized
from lmjax.config import build, call, from_dict, to_dict
from lmjax.convert import peft
from lmjax.convert.exports import described
from lmjax.convert.places import EXAMPLE, Place, places_of
from lmjax.convert.settings import Settings
from lmjax.convert.workdirs import (
    check_empty,
    read,
    read_all,
    shape_of,
    tree,
    whole,
    with_model,
    write,
    write_arrays,
)
from lmjax.engine.stored import Stored
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
    check_empty(workdir)
    stored, held, lie = whole(base, step)
    node = to_dict(recorded_model(base))
    model = build(from_dict(node))
    if isinstance(model, Adapted):
        raise UserError(f"{base} has adapters already: merge them first.")
    places = _places(model)

    def kernel(path: str) -> np.ndarray:
        return read(stored, lie, f"{path}/kernel")

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

    shapes = {name: shape_of(held["arrays"][path]) for name, path in lie.items()}
    shapes |= {f"params/{k}": jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
    write(base, workdir, held, with_model(held, to_dict(recorded)), shapes, blocks)
    return adapter


def export_adapter(workdir: Path, to: Path, *, step: int | None = None) -> str:
    """Writes the adapter of a run as a folder that `peft` loads on the exported base; its name.

    Raises:
      UserError: where the run has no adapter or several, or one that peft does not know; where
        `to` holds an adapter.
    """
    if (to / peft.CONFIG).exists():
        raise UserError(f"{to} holds an adapter already: give another --to.")
    stored, _, lie = whole(workdir, step)
    model = _adapted(workdir)
    places = _places(model.model)
    tuned = {path for sites in model.sites(EXAMPLE).values() for path in sites}
    wanted = {f"{path}/kernel" for path in tuned}
    names = {adapter.name for adapter in model.adapters}
    paths = [name.removeprefix("params/") for name in lie]
    params = {
        path: read(stored, lie, path)
        for path in paths
        if path in wanted or path.split("/")[-2] in names
    }
    base = peft.fingerprint(stored, lie, sorted(tuned))
    causal = hasattr(model, "init_cache")
    peft.write_adapter(to, model, params, places, causal=causal, base=base)
    return model.adapters[0].name


def merge(workdir: Path, to: Path, *, step: int | None = None) -> None:
    """Writes a workdir of a run's model without its adapters, whose kernels hold what they did.

    Where the adapters tune a quantised model, what is written is the one that it wraps, in float32.

    Raises:
      UserError: where the run has no adapters, or one that is no linear function; where `to` holds
        a run.
    """
    check_empty(to)
    stored, held, lie = whole(workdir, step)
    model = _adapted(workdir)
    old = read_all(stored, lie)
    merged = flatten_dict(model.merged(tree(old), EXAMPLE), sep="/")
    arrays = {
        path: np.asarray(x).astype(old[path].dtype if path in old else np.float32)
        for path, x in merged.items()
    }
    node = to_dict(recorded_model(workdir))["model"]
    if isinstance(model.model, Quantized):
        node = node["model"]
    write_arrays(workdir, to, held, with_model(held, node), arrays)


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
    if isinstance(model, Quantized):
        raise UserError(
            "folders of peft's are of plain weights, and the base is quantised: merge what was "
            "tuned (python -m lmjax.convert merge), or import over the plain base."
        )
    family, fields = described(model)
    return places_of(model, family.parts(Settings("the model", fields)))


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
