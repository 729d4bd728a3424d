"""Products with weights that are split over devices, with their collectives written out.

Left to itself the partitioner sums whole weight gradients on every device and moves activations
that could stay. Here each device completes its rows of the weights over `fsdp` when it needs them
(ZeRO-3, arXiv:1910.02054, section 5.3) and, where the tensor axis splits them, gathers the tokens
of its neighbours before a product over columns and scatters the sum after one over rows (Megatron
sequence parallelism, arXiv:2205.05198, section 4.2.2). The transpose of a gather is a
reduce-scatter, so that every gradient arrives summed and split.
"""

# Shape legend: B batch, T length.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lmjax import sharding
from lmjax.ops.blockwise import Blocks, dequantise, multiply

# By this name remat policies know what is gathered again rather than kept for the backward pass.
GATHERED = "gathered"

Names = tuple[str | None, ...]
Product = Callable[[jax.Array, jax.Array], jax.Array]

# What an axis of a kernel is called in the activations that it meets.
_ACTIVATION = {name: f"act_{name}" for name in ("mlp", "heads", "kv_heads", "vocab")}


def complete(w: jax.Array, name: str, axis: int, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """One device's part of an array, made whole along `axis`, which is called `name`.

    The parts travel in `dtype`, by default their own; their gradients are summed in their own.
    """
    mesh_axes = tuple(sharding.split_axes(name))
    low = w.dtype if dtype is None else dtype
    if not mesh_axes:
        return w.astype(low)

    @jax.custom_vjp
    def gather(w: jax.Array) -> jax.Array:
        return lax.all_gather(w.astype(low), mesh_axes, axis=axis, tiled=True)

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        gradient = gradient.astype(w.dtype)
        return (lax.psum_scatter(gradient, mesh_axes, scatter_dimension=axis, tiled=True),)

    gather.defvjp(lambda w: (gather(w), None), backward)
    return gathered(gather(w))


def gathered(x: jax.Array) -> jax.Array:
    """`x`, marked as what came together from several devices: see `layers.remat`."""
    return checkpoint_name(x, GATHERED)


def spread(
    product: Product,
    x: jax.Array,
    w: jax.Array | Blocks,
    axes: Names,
    *,
    in_dims: int,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`product(x, w)`, the contraction of the last `in_dims` axes of x with the first of w.

    x is [B, T, ..., *in] or [B, *in]; its rows are split over the batch's axes, its tokens and
    features as the names of the kernel's axes say. Without a mesh, `product` itself. Of weights in
    few bits these travel, and each device makes of them what it multiplies by.

    Args:
      product: of one device's parts.
      axes: names of the kernel's axes, inputs first.
      dtype: in which weights travel, where it is not their own.
    """
    if not sharding.split():
        return multiply(product, x, w) if isinstance(w, Blocks) else product(x, w)
    ins, outs = axes[:in_dims], axes[in_dims:]
    lead = x.ndim - in_dims
    has_length = lead > 1
    summed = [a for name in ins if name in _ACTIVATION for a in sharding.split_axes(name)]
    spread_out = any(sharding.split_axes(name) for name in outs if name in _ACTIVATION)
    across_T = sharding.split_over_length(x.shape[1]) if has_length else []
    fsdp = sharding.split_axes("embed") and "embed" in axes
    scattered = bool(summed) and across_T == summed

    def completed(w: jax.Array, names: Names, dtype: jnp.dtype | None = None) -> jax.Array:
        split = fsdp and "embed" in names
        return complete(w, "embed", names.index("embed"), dtype=dtype) if split else w

    def multiplied(x: jax.Array, w: jax.Array | Blocks) -> jax.Array:
        if not isinstance(w, Blocks):
            return product(x, completed(w, axes, dtype))
        return multiply(product, x, w, whole)

    def whole(w: Blocks) -> jax.Array:
        data, scale = completed(w.data, axes), completed(w.scale, scale_axes(axes, w.axis))
        name, first = axes[w.axis], None
        if name and name != "embed" and (ways := tuple(sharding.split_axes(name))):
            size = x.shape[x.ndim - in_dims + w.axis] // math.prod(map(sharding.axis_size, ways))
            first = lax.axis_index(ways) * size
        return dequantise(replace(w, data=data, scale=scale), first=first)

    def local(x: jax.Array, w: jax.Array | Blocks) -> jax.Array:
        if across_T and spread_out and not summed:
            x = gathered(lax.all_gather(x, tuple(across_T), axis=1, tiled=True))
        y = multiplied(x, w)
        if scattered:
            return lax.psum_scatter(y, tuple(summed), scatter_dimension=1, tiled=True)
        return lax.psum(y, tuple(summed)) if summed else y

    def tokens(residual: bool) -> Names:
        if not has_length:
            return ("batch",)
        return ("batch", "residual" if residual and across_T else "length") + (None,) * (lead - 2)

    def features(names: Names) -> Names:
        return tuple(_ACTIVATION.get(name) if name else None for name in names)

    x_axes = (*tokens(not summed), *features(ins))
    y_axes = (*tokens(scattered or not (summed or spread_out)), *features(outs))
    if not isinstance(w, Blocks):
        return sharding.per_device(local, (x_axes, axes), y_axes)(x, w)

    def of_blocks(x: jax.Array, data: jax.Array, scale: jax.Array) -> jax.Array:
        return local(x, replace(w, data=data, scale=scale))

    given = (x_axes, axes, scale_axes(axes, w.axis))
    return sharding.per_device(of_blocks, given, y_axes)(x, w.data, w.scale)


def scale_axes(axes: Names, axis: int) -> Names:
    """Names of the axes of a kernel's scales: every device has those of all blocks.

    So blocks need not divide into as many parts as the weights do.
    """
    return tuple(None if i == axis else name for i, name in enumerate(axes))
