"""Rows of a table that is split over devices."""

# Shape legend: N rows of the table, D embed, B batch, T length.

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.ops.spread import complete


def lookup(table_ND: jax.Array, index_BT: jax.Array, *, rows: str, dtype: jnp.dtype) -> jax.Array:
    """table[index] as [B, T, D] in `dtype`, for a table with the axis names (rows, "embed").

    On a mesh each device completes its rows along D, looks up the tokens of its part of the batch
    and, where the rows are split, adds what the others hold: only rows travel, never the indices of
    other devices, and the gradient of the table arrives summed and split (a reduce-scatter). B = 1
    is for positions that all examples share.
    """
    batch = None if index_BT.shape[0] == 1 else "batch"
    split_N = sharding.split_axes(rows)
    across_T = sharding.split_over_length(index_BT.shape[1])
    # Where the rows are split over the axes that also split the length, these meet in one sum.
    scattered = bool(split_N) and across_T == split_N

    def local(table: jax.Array, index: jax.Array) -> jax.Array:
        table = complete(table, "embed", 1, dtype=dtype)
        if not split_N:
            return _take(table, index)
        index = index - lax.axis_index(tuple(split_N)) * table.shape[0]
        here = (index >= 0) & (index < table.shape[0])
        found = jnp.where(here[..., None], _take(table, index), 0)
        if scattered:
            return lax.psum_scatter(found, tuple(split_N), scatter_dimension=1, tiled=True)
        return lax.psum(found, tuple(split_N))

    tokens = "residual" if across_T and not split_N else "length"
    out = "residual" if across_T and (scattered or not split_N) else "length"
    return sharding.per_device(local, ((rows, "embed"), (batch, tokens)), (batch, out, None))(
        table_ND, index_BT
    )


@jax.custom_vjp
def _take(table_ND: jax.Array, index_BT: jax.Array) -> jax.Array:
    """table[index], an index out of range taken for the nearest; the gradient sums in float32."""
    return jnp.take(table_ND, index_BT, axis=0, mode="clip")


def _take_fwd(table_ND: jax.Array, index_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _take(table_ND, index_BT), (index_BT, jnp.zeros((table_ND.shape[0], 0), table_ND.dtype))


def _take_bwd(residuals: tuple[jax.Array, ...], gradient_BTD: jax.Array) -> tuple[jax.Array, None]:
    index_BT, like = residuals
    sums_ND = jnp.zeros((like.shape[0], gradient_BTD.shape[-1]), jnp.float32)
    sums_ND = sums_ND.at[index_BT].add(gradient_BTD.astype(jnp.float32), mode="clip")
    return sums_ND.astype(like.dtype), None


_take.defvjp(_take_fwd, _take_bwd)
