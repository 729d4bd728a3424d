"""The mesh in use: what a traced function may ask of it, and how it spreads its work over it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.sharding.layout import Layout
from lmjax.sharding.names import AXES, RULES, Rules, check_axes, mesh_axes


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How the layers go over `stage`: stages, microbatches in flight, rounds of each of them."""

    stages: int = 1
    microbatches: int = 1
    repeats: int = 1


@dataclass(frozen=True)
class _Active:
    mesh: Mesh
    pipeline: Pipeline
    rules: Rules


_ACTIVE: ContextVar[_Active | None] = ContextVar("active_mesh", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, layout: Layout | None = None, rules: Rules = RULES) -> Iterator[None]:
    """Within it, `shard` and `per_device` mean this mesh, and `platform` that of its devices."""
    stages = mesh.shape["stage"]
    pipeline = Pipeline(
        stages=stages,
        microbatches=(layout and layout.stage_microbatches) or stages,
        repeats=layout.stage_repeats if layout else 1,
    )
    token = _ACTIVE.set(_Active(mesh, pipeline, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def mapped(axis: str) -> Iterator[None]:
    """Within it no name means `axis`, which `vmap(spmd_axis_name=axis)` maps the code over."""
    active = _ACTIVE.get()
    if active is None:
        yield
        return
    rules = {name: tuple(a for a in part if a != axis) for name, part in active.rules.items()}
    token = _ACTIVE.set(replace(active, rules=rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def split() -> bool:
    """Whether the mesh in use has more than one device."""
    active = _ACTIVE.get()
    return active is not None and active.mesh.size > 1


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use; 1 without one."""
    active = _ACTIVE.get()
    return 1 if active is None else active.mesh.shape[axis]


def split_axes(name: str) -> list[str]:
    """The axes of the mesh in use, of more than one device, that a name is split over."""
    active = _ACTIVE.get()
    return [] if active is None else [a for a in active.rules[name] if active.mesh.shape[a] > 1]


def split_over_length(length: int) -> list[str]:
    """The mesh axes that split residuals along the length, beyond those of the sequence itself.

    None where they do not divide it.
    """
    inner = split_axes("length")
    extra = [axis for axis in split_axes("residual") if axis not in inner]
    return [] if length % math.prod(map(axis_size, [*inner, *extra])) else extra


def ways(name: str) -> int:
    """Into how many parts the mesh in use splits an axis of this name; 1 without a mesh."""
    active = _ACTIVE.get()
    return 1 if active is None else math.prod(active.mesh.shape[a] for a in active.rules[name])


def pipeline() -> Pipeline:
    """How layers are spread over the stages of the mesh in use."""
    active = _ACTIVE.get()
    return Pipeline() if active is None else active.pipeline


Names = tuple[str | None, ...] | None


def per_device(
    function: Callable[..., Any], in_axes: Sequence[Names], out_axes: Any
) -> Callable[..., Any]:
    """`function` on each device's parts of its arguments; without a mesh, `function` itself.

    Collectives inside name mesh axes. An axis of the mesh over which an argument is not split holds
    copies of it.

    Args:
      in_axes: the axis names of each argument (an array, or a tree of arrays named alike); None for
        one that every device holds whole.
      out_axes: likewise, in the structure of what `function` returns.
    """
    active = _ACTIVE.get()
    if active is None or active.mesh.size == 1:
        return function

    # Over axes of one device everything is split, into one part: what is not split, jax sums over.
    single = tuple(axis for axis, size in active.mesh.shape.items() if size == 1)

    def part(names: Names) -> PartitionSpec:
        if not names:
            return PartitionSpec()
        parts = [
            tuple(axis for axis in part if axis not in single)
            for part in mesh_axes(names, active.rules)
        ]
        return PartitionSpec(single + parts[0], *(part or None for part in parts[1:]))

    def is_names(x: Any) -> bool:
        return x is None or (isinstance(x, tuple) and all(n is None or n in AXES for n in x))

    return jax.shard_map(
        function,
        mesh=active.mesh,
        in_specs=tuple(part(names) for names in in_axes),
        out_specs=jax.tree.map(part, out_axes, is_leaf=is_names),
        check_vma=False,
    )


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's axes, by name, to the mesh in use; without one, returns `x`."""
    check_axes(axes, x.ndim)
    active = _ACTIVE.get()
    if active is None or active.mesh.size == 1:
        return x
    parts: list[tuple[str, ...] | None] = []
    for size, part in zip(x.shape, mesh_axes(axes, active.rules), strict=True):
        while size % math.prod(active.mesh.shape[a] for a in part):
            part = part[:-1]  # one token in decoding: the last axes of the mesh hold copies
        parts.append(part or None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(active.mesh, PartitionSpec(*parts)))


def platform() -> str:
    """What is compiled for ('cpu', 'gpu', 'tpu'): the mesh in use, else jax's default backend."""
    active = _ACTIVE.get()
    name = jax.default_backend() if active is None else active.mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name
