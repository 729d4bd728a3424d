"""Names of array axes, the table from them to mesh axes, and what carries names: parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lmjax.errors import UserError, did_you_mean
from lmjax.sharding.layout import Split, nearest

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
    "token_types": (),
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
    "act_layers": ("stage",),  # what each stage works on
}
AXES = frozenset(RULES)


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
    check_axes(axes, len(shape))
    value: Any = module.param(name, lambda rng: Boxed(init(rng, shape, dtype), axes))
    return value  # without its box


def shardings_of(tree: Any, mesh: Mesh, rules: Rules = RULES, *, also: Sequence[Split] = ()) -> Any:
    """The sharding of every leaf of a tree with boxed parameters, in the tree's unboxed structure.

    What has no box (a step counter), no longer the rank of its box or a single
    element (the placeholders of Adafactor) is replicated. Raises UserError where a mesh
    axis does not divide a parameter, with the nearest layouts that divide all of them and what is
    in `also`.
    """
    splits = [*splits_of(tree, rules), *also]
    for split in splits:
        if not split.fits(mesh.shape):
            raise UserError(
                f"{split.what} has {split.size} along {split.name!r}, which "
                f"{' x '.join(split.axes)} = {split.ways(mesh.shape)} devices do not divide. "
                f"{nearest(mesh.shape, mesh.size, splits)}"
            )

    def of(leaf: Any) -> NamedSharding:
        if not _is_split(leaf):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, spec(leaf.axes, rules))

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, Boxed))


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, Boxed) and leaf.value.ndim == len(leaf.axes) and leaf.value.size != 1


def splits_of(tree: Any, rules: Rules = RULES) -> list[Split]:
    """What the mesh has to divide for this tree, each (size, mesh axes) once."""
    found: dict[tuple[int, tuple[str, ...]], Split] = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Boxed))
    for path, leaf in leaves:
        if not _is_split(leaf):
            continue
        where = f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}"
        parts = mesh_axes(leaf.axes, rules)
        for size, name, part in zip(leaf.value.shape, leaf.axes, parts, strict=True):
            if part:
                found.setdefault((size, part), Split(where, size, name, part))
    return list(found.values())


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """The sharding of every array of a batch: rows over the data-parallel axes."""
    return NamedSharding(mesh, spec(("batch",), rules))


def batch_ways(mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in rules["batch"])


def split_batch(batch_size: int, microbatches: int, mesh: Mesh, rules: Rules = RULES) -> Split:
    """How the mesh splits a batch; raises UserError where it does not, naming what would."""
    split = Split("batch_size", batch_size, "batch", rules["batch"], microbatches)
    if split.fits(mesh.shape):
        return split
    parts = split.ways(mesh.shape)
    lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
    near = " or ".join(str(n) for n in dict.fromkeys((lower, upper)) if n)
    raise UserError(
        f"batch_size {batch_size} does not divide into {batch_ways(mesh, rules)} data-parallel "
        f"parts x {microbatches} microbatches. The nearest that do: {near}. "
        f"{nearest(mesh.shape, mesh.size, [split])}"
    )


def unbox(tree: Any) -> Any:
    """The tree without its boxes."""
    return meta.unbox(tree)


def check_axes(axes: Sequence[str | None], rank: int) -> None:
    """Raises ValueError for a name that the table lacks, and for another number of names."""
    for axis in axes:
        if axis is not None and axis not in AXES:
            raise ValueError(f"unknown axis name {axis!r}." + did_you_mean(axis, AXES))
    if len(axes) != rank:
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for an array of rank {rank}")
