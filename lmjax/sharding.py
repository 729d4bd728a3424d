"""All partitioning of lmjax: names for array axes, one table from names to mesh axes, and the mesh.

A model names the axes of its parameters (`param`) and of its activations (`shard`); a `Layout` says
how many devices each mesh axis has; `RULES` joins the two. Weights and activations have different
names, so that fully sharded data parallelism is the one rule `embed -> fsdp`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax.errors import UserError, did_you_mean

# Outermost (slowest network) first: neighbours in `tensor` are neighbours on the chip's own links.
MESH_AXES = ("slices", "data", "fsdp", "stage", "context", "expert", "tensor")

Rules = Mapping[str, tuple[str, ...]]
RULES: Rules = {
    # parameters
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": ("stage",),
    "head_dim": (),
    "positions": (),
    "norm": (),
    # activations
    "batch": ("slices", "data", "fsdp", "expert"),
    "length": ("context",),
    "residual": ("context", "tensor"),  # the length outside attention and MLP: norms, residuals
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_vocab": ("tensor",),
}
AXES = frozenset(RULES)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many devices lie along each mesh axis; one of them may be -1, for all that remain.

    `slices` are data-parallel groups joined by the slow network. `data` replicates parameters,
    `fsdp` shards them and their moments, `tensor` splits heads, hidden units and vocabulary,
    `context` the sequence, `expert` the experts (and, like `data`, the batch) and `stage` the
    layers.

    Args:
      stage_microbatches: parts of the batch that follow each other through the stages; 0 for one
        per stage.
      stage_repeats: how often a microbatch goes round the stages, each time through the next
        layers (a circular schedule): more shrink the share of idle stages.
    """

    slices: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    stage: int = 1
    stage_microbatches: int = 0
    stage_repeats: int = 1

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        if bad := [a for a, n in sizes.items() if n < 1 and n != -1]:
            raise UserError(f"{bad[0]} is {sizes[bad[0]]}: must be at least 1, or -1 for the rest.")
        if len(free := [a for a, n in sizes.items() if n == -1]) > 1:
            raise UserError(f"{' and '.join(free)} are -1: only one axis can take the rest.")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The mesh shape on `num_devices` devices, -1 resolved.

        Raises UserError where it does not fit.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = math.prod(n for n in sizes.values() if n != -1)
        asks = f"a multiple of {fixed}" if -1 in sizes.values() else str(fixed)
        for axis, n in sizes.items():
            if n == -1 and num_devices % fixed == 0:
                sizes[axis] = num_devices // fixed
        if math.prod(sizes.values()) != num_devices:
            given = ", ".join(f"{a}={getattr(self, a)}" for a in MESH_AXES if getattr(self, a) != 1)
            fits = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
            raise UserError(
                f"layout ({given or 'one device'}) asks for {asks} devices, and there are "
                f"{num_devices}. The product of all axes must be {num_devices}: sizes that divide "
                f"it are {', '.join(map(str, fits))}; -1 takes what remains."
            )
        return sizes

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The device mesh, all axes named, neighbours together where the platform knows them."""
        devices = jax.devices() if devices is None else devices
        shape = tuple(self.sizes(len(devices)).values())
        if devices[0].platform == "tpu":
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        else:
            grid = np.asarray(devices).reshape(shape)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@struct.dataclass
class Boxed(meta.AxisMetadata[Any]):
    """A parameter with the names of its axes; `flax` lifts and unboxes it."""

    value: Any
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The parameter itself."""
        return self.value

    def replace_boxed(self, val: Any) -> Boxed:
        """The same names around another value."""
        return Boxed(val, self.axes)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Boxed:
        """Names the axis that `nn.scan` stacks on, from its `metadata_params={"axis": name}`."""
        axes = list(self.axes)
        axes.insert(index, params["axis"])
        return Boxed(self.value, tuple(axes))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Boxed:
        """Inverse of `add_axis`."""
        del params
        return Boxed(self.value, self.axes[:index] + self.axes[index + 1 :])


def param(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Declares a parameter of `module` whose axes are named; an unknown name raises ValueError."""
    _check_axes(axes, len(shape))
    value: Any = module.param(name, lambda rng: Boxed(init(rng, shape, dtype), axes))
    return value  # without its box


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


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use; 1 without one."""
    active = _ACTIVE.get()
    return 1 if active is None else active.mesh.shape[axis]


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

    def part(names: Names) -> PartitionSpec:
        return PartitionSpec() if names is None else spec(names, active.rules)

    is_names = lambda x: x is None or (  # noqa: E731
        isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)
    )
    return jax.shard_map(
        function,
        mesh=active.mesh,
        in_specs=tuple(part(names) for names in in_axes),
        out_specs=jax.tree.map(part, out_axes, is_leaf=is_names),
        check_vma=False,
    )


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's axes, by name, to the mesh in use; without one, returns `x`."""
    _check_axes(axes, x.ndim)
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


def mesh_axes(axes: Sequence[str | None], rules: Rules = RULES) -> list[tuple[str, ...]]:
    """The mesh axes that each named axis is split over; each serves the first name that asks."""
    used: set[str] = set()
    parts = []
    for name in axes:
        parts.append(tuple(a for a in (rules[name] if name else ()) if a not in used))
        used.update(parts[-1])
    return parts


def spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """The partition of an array with these axis names."""
    return PartitionSpec(*(part or None for part in mesh_axes(axes, rules)))


def shardings_of(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The sharding of every leaf of a tree with boxed parameters, in the tree's unboxed structure.

    What has no box (a step counter), no longer the rank of its box (the factored moments of
    Adafactor) or a single element (their placeholders) is replicated. Raises UserError where a mesh
    axis does not divide a parameter.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, Boxed) or leaf.value.ndim != len(leaf.axes) or leaf.value.size == 1:
            return NamedSharding(mesh, PartitionSpec())
        parts = mesh_axes(leaf.axes, rules)
        for size, name, part in zip(leaf.value.shape, leaf.axes, parts, strict=True):
            ways, split = math.prod(mesh.shape[a] for a in part), " x ".join(part)
            if size % ways:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"parameter {where} has {size} along {name!r}, which {split} = {ways} devices "
                    f"do not divide. Choose a layout whose {split} divides {size}."
                )
        return NamedSharding(mesh, spec(leaf.axes, rules))

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda x: isinstance(x, Boxed))


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """The sharding of every array of a batch: rows over the data-parallel axes."""
    return NamedSharding(mesh, spec(("batch",), rules))


def batch_ways(mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in rules["batch"])


def unbox(tree: Any) -> Any:
    """The tree without its boxes."""
    return meta.unbox(tree)


def _check_axes(axes: Sequence[str | None], rank: int) -> None:
    for axis in axes:
        if axis is not None and axis not in AXES:
            raise ValueError(f"unknown axis name {axis!r}." + did_you_mean(axis, AXES))
    if len(axes) != rank:
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for an array of rank {rank}")
