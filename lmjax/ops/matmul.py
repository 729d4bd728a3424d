"""Matrix products in mixed precision: low-precision operands, fp32 sums, fp32 master gradients.

On a CPU activations flow in fp32 (bf16 arithmetic other than products is emulated there and slow)
and operands are rounded to bf16 right at the product; elsewhere activations are bf16 throughout.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.ops.quantize import Parts, Products, Quantized, quantized_contract

Axes = tuple[int, ...]

# Below this many rows XLA:CPU's bf16 product reads weights at 1 GB/s, its fp32 product at 20.
_FEW_ROWS = 8


def activation_dtype(dtype: str) -> jnp.dtype:
    """The dtype in which activations flow when products are computed in `dtype`."""
    return jnp.dtype("float32") if sharding.platform() == "cpu" else jnp.dtype(dtype)


def travelling_dtype(dtype: str | jnp.dtype) -> jnp.dtype | None:
    """The dtype in which weights go between devices to products in `dtype`; None for their own.

    On a CPU they stay as they are, and every number is that of one device.
    """
    return None if sharding.platform() == "cpu" else jnp.dtype(dtype)


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    dtype: str,
    in_dims: int = 1,
    products: Products = "default",
    parts: Parts | None = None,
) -> jax.Array:
    """Contracts the last `in_dims` axes of x with the first `in_dims` axes of w.

    Neither side is reshaped, so an axis of w (heads, say) may be sharded. The gradient with respect
    to w has the dtype of w and is summed in fp32. `products` may ask for 8-bit operands, see
    `quantize.Quantized`, with scales that the devices of `parts` share.
    """
    axes = (tuple(range(x.ndim - in_dims, x.ndim)), tuple(range(in_dims)))
    if products != "default":
        how = Quantized(
            kind=products,
            x_axes=axes[0],
            w_axes=axes[1],
            dtype=jnp.dtype(dtype),
            result=activation_dtype(dtype),
            parts=parts or Parts(),
        )
        return quantized_contract(x, w, how)
    return contract(x, w, dtype=dtype, axes=axes)


def contract(
    x: jax.Array,
    w: jax.Array,
    *,
    dtype: str,
    axes: tuple[Axes, Axes],
    result: str | None = None,
) -> jax.Array:
    """Contracts axes[0] of x, its last ones, with axes[1] of w; see `matmul`.

    `result` is the dtype of the product where it is not the activations'.
    """
    x_axes, w_axes = axes
    if [x.shape[a] for a in x_axes] != [w.shape[a] for a in w_axes]:
        raise ValueError(
            f"cannot contract axes {x_axes} of shape {x.shape} with axes {w_axes} of {w.shape}"
        )
    operand = jnp.dtype(dtype)
    out = jnp.dtype(result) if result else activation_dtype(dtype)
    if sharding.platform() != "cpu" or operand == jnp.float32:
        x, w = x.astype(operand), w.astype(operand)
        return lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=out)
    if math.prod(x.shape[: x.ndim - len(x_axes)]) < _FEW_ROWS:
        return dot(x.astype(jnp.float32), w.astype(jnp.float32), *axes).astype(out)
    return _contract_cpu(x.astype(jnp.float32), w, axes, operand).astype(out)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contract_cpu(
    x: jax.Array, w: jax.Array, axes: tuple[Axes, Axes], operand: jnp.dtype
) -> jax.Array:
    return dot(x.astype(operand), w.astype(operand), *axes)


def _contract_cpu_fwd(
    x: jax.Array, w: jax.Array, axes: tuple[Axes, Axes], operand: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    x, w_low = x.astype(operand), w.astype(operand)
    # The empty array carries w's dtype to the backward.
    return dot(x, w_low, *axes), (x, w_low, jnp.zeros((0,), w.dtype))


def _contract_cpu_bwd(
    axes: tuple[Axes, Axes],
    operand: jnp.dtype,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, w, like_w = residuals
    x_axes, w_axes = axes
    rows = tuple(range(x.ndim - len(x_axes)))
    columns = tuple(a for a in range(w.ndim) if a not in w_axes)
    dy = dy.astype(operand)
    dx = dot(dy, w, tuple(range(len(rows), dy.ndim)), columns)
    if columns == tuple(range(len(w_axes), w.ndim)):
        dw = dot(x, dy, rows, rows)
    else:  # w is stored with its output axes first, as an embedding is
        dw = dot(dy, x, rows, rows)
    return dx, dw.astype(like_w.dtype)


_contract_cpu.defvjp(_contract_cpu_fwd, _contract_cpu_bwd)


def dot(x: jax.Array, y: jax.Array, x_axes: Axes, y_axes: Axes) -> jax.Array:
    """Contracts x_axes of x with y_axes of y, summed and returned in fp32."""
    return lax.dot_general(x, y, ((x_axes, y_axes), ((), ())), preferred_element_type=jnp.float32)
