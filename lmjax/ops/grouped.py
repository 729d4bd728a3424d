"""Products of groups of rows with a matrix each: operands in `dtype`, sums in fp32."""

# Shape legend: S rows, L groups (the experts of a device), D in, F out.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from lmjax.ops.matmul import activation_dtype


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped(x_SD: jax.Array, w_LDF: jax.Array, sizes_L: jax.Array, dtype: str) -> jax.Array:
    """The first sizes_L[0] rows times w_LDF[0], the next times w_LDF[1], and so on.

    Rows beyond the last group are undefined.
    """
    return _grouped_fwd(x_SD, w_LDF, sizes_L, dtype)[0]


def _each(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, which under `vmap` is called for each element: jax cannot map ragged products."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _(size: int, batched: list[bool], *args: jax.Array) -> tuple[jax.Array, bool]:
        def one(index: int | jax.Array) -> jax.Array:
            parts = zip(args, batched, strict=True)
            return mapped(*(a[index] if split else a for a, split in parts))

        return (one(0)[None] if size == 1 else lax.map(one, jnp.arange(size))), True

    return mapped


def _ragged_dot(x: jax.Array, w: jax.Array, sizes_L: jax.Array, dtype: str) -> jax.Array:
    product = partial(lax.ragged_dot, preferred_element_type=activation_dtype(dtype))
    return _each(product)(x, w, sizes_L)


def _grouped_fwd(
    x_SD: jax.Array, w_LDF: jax.Array, sizes_L: jax.Array, dtype: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x, w = x_SD.astype(dtype), w_LDF.astype(dtype)
    like_x, like_w = jnp.zeros((0,), x_SD.dtype), jnp.zeros((0,), w_LDF.dtype)
    return _ragged_dot(x, w, sizes_L, dtype), (x, w, sizes_L, like_x, like_w)


_BY_GROUP = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def _grouped_bwd(
    dtype: str, residuals: tuple[jax.Array, ...], dy_SF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes_L, like_x, like_w = residuals
    dy = dy_SF.astype(dtype)
    dx = _ragged_dot(dy, jnp.swapaxes(w, 1, 2), sizes_L, dtype)
    by_group = partial(
        lax.ragged_dot_general,
        ragged_dot_dimension_numbers=_BY_GROUP,
        preferred_element_type=jnp.float32,
    )
    dw = _each(by_group)(x, dy, sizes_L)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype), None


grouped.defvjp(_grouped_fwd, _grouped_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def batched(x_LSD: jax.Array, w_LDF: jax.Array, dtype: str) -> jax.Array:
    """The rows x_LSD[l] times w_LDF[l], for each l."""
    return _batched_fwd(x_LSD, w_LDF, dtype)[0]


def _batch_dot(x: jax.Array, y: jax.Array, over: tuple[int, int], out: Any) -> jax.Array:
    numbers = (((over[0],), (over[1],)), ((0,), (0,)))
    return lax.dot_general(x, y, numbers, preferred_element_type=out)


def _batched_fwd(
    x_LSD: jax.Array, w_LDF: jax.Array, dtype: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x, w = x_LSD.astype(dtype), w_LDF.astype(dtype)
    like_x, like_w = jnp.zeros((0,), x_LSD.dtype), jnp.zeros((0,), w_LDF.dtype)
    return _batch_dot(x, w, (2, 1), activation_dtype(dtype)), (x, w, like_x, like_w)


def _batched_bwd(
    dtype: str, residuals: tuple[jax.Array, ...], dy_LSF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w, like_x, like_w = residuals
    dy = dy_LSF.astype(dtype)
    dx = _batch_dot(dy, w, (2, 2), activation_dtype(dtype))
    return dx.astype(like_x.dtype), _batch_dot(x, dy, (1, 1), jnp.float32).astype(like_w.dtype)


batched.defvjp(_batched_fwd, _batched_bwd)
