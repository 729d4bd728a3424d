"""Matrix products of 8-bit operands, scaled as they come, and the switch that asks for them.

The parameters stay what they are: whether a product with them is quantised is a choice of the
program that runs the model, made in one place (`products`), and never the model's own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.errors import UserError

Products = Literal["default", "int8", "fp8"]
Axes = tuple[int, ...]

# A row of zeros is scaled as if it held this; far below any gradient, and normal in fp32.
_TINY = 1e-30

# Read while tracing, and part of jit's cache key: a function traced without is traced again within.
_ACTIVE: Any = jax.make_user_context(default_value=("default", ""))


@contextlib.contextmanager
def products(kind: Products, *, where: str = "") -> Iterator[None]:
    """Within it, products with the weights in whose parameter paths `where` is found are `kind`.

    It reaches every `layers.Linear` that is traced within it, in whatever model.
    """
    with _ACTIVE((kind, where)):
        yield


def products_at(path: Sequence[str]) -> Products:
    """The kind of product that `products` asks for, with the weights at this path."""
    kind, where = _ACTIVE.value
    return kind if kind != "default" and re.search(where, "/".join(path)) else "default"


@dataclass(frozen=True)
class Parts:
    """Mesh axes that split the operands where a product is called on each device's parts of them.

    A maximum over an array goes over its parts too, so that scales are those of one device. Empty
    where arrays are whole, or split by the partitioner.
    """

    contracted: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    all: tuple[str, ...] = ()


def parts_of(axes: Sequence[str | None], in_dims: int) -> Parts:
    """The parts in which `ops.spread` has a kernel with these axis names multiplied."""

    def split(names: Sequence[str | None]) -> tuple[str, ...]:
        found = [a for n in names if n and n != "embed" for a in sharding.split_axes(n)]
        return tuple(dict.fromkeys(found))  # a device holds its part of the kernel whole in embed

    rows = split(("batch", "length", "residual"))
    contracted, columns = split(axes[:in_dims]), split(axes[in_dims:])
    return Parts(contracted, columns, tuple(dict.fromkeys(rows + contracted + columns)))


def check_device(kind: Products, device: Any) -> None:
    """Raises UserError where fp8 products would be emulated, and so slower than bfloat16.

    On a CPU they are emulated too, and allowed: for tests.
    """
    if kind != "fp8" or device.platform == "cpu":
        return
    if device.platform == "tpu":
        generation = re.match(r"TPU ?v?(\d+)", device.device_kind)
        if generation and int(generation[1]) >= 7:
            return
    elif re.fullmatch(r"\d+\.\d+", version := str(getattr(device, "compute_capability", ""))):
        major, minor = version.split(".")
        if (int(major), int(minor)) >= (8, 9):
            return
    raise UserError(
        f"products are fp8, and {device.device_kind} has no fp8 units. NVIDIA GPUs of compute "
        "capability 8.9 or higher (L4, L40S, H100, H200, B200) and TPU7x have them. Use int8 or "
        "default."
    )


def quantize(
    x: jax.Array,
    axes: Axes | None,
    dtype: jax.typing.DTypeLike,
    *,
    parts: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Returns (q, scale), x = q * scale but for rounding; |q| reaches the largest of its dtype.

    Symmetric absmax scaling. `axes` are those that share a scale, which keeps them at size 1; None
    for one scale of the whole tensor. `parts` are the mesh axes whose devices share it.
    """
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = jnp.iinfo(dtype).max if integer else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    if parts:
        top = lax.pmax(top, parts)
    scale = jnp.maximum(top, _TINY) / largest
    q = x / scale
    return (jnp.round(q) if integer else q).astype(dtype), scale


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """How a product is quantised.

    'int8': a scale per row of x and per output channel of w, exact int32 sums, then both scales.
    The gradient of x is made likewise (a scale per row of dy and per input channel of w); that of
    w, whose sum runs over all tokens, from operands in `dtype`.
    Source: Dettmers et al., arXiv:2208.07339, section 2; Wortsman et al., "SwitchBack",
    arXiv:2304.13013, algorithm 1, with a scale per channel of w rather than one for all.

    'fp8': one scale per tensor, from its current maximum; e4m3 for x and w, e5m2 for dy, in all
    three products. x is kept for the backward pass in e4m3.
    Source: Micikevicius et al., arXiv:2209.05433, section 3.

    Both are straight-through: rounding has the gradient of the identity.

    Args:
      kind: 'int8' or 'fp8'.
      x_axes: the last axes of x, contracted with
      w_axes: these of w.
      dtype: of the operands that are not quantised.
      result: dtype of the product.
      parts: over which devices scales are shared.
    """

    kind: Products
    x_axes: Axes
    w_axes: Axes
    dtype: jnp.dtype
    result: jnp.dtype
    parts: Parts = Parts()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_contract(x: jax.Array, w: jax.Array, how: Quantized) -> jax.Array:
    """Contracts the last axes of x with those of w, in 8-bit operands; see `Quantized`."""
    return _forward(x, w, how)[0]


def _forward(x: jax.Array, w: jax.Array, how: Quantized) -> tuple[jax.Array, tuple[Any, ...]]:
    if how.kind == "int8":
        over = how.parts.contracted
        x8 = quantize(x, how.x_axes, jnp.int8, parts=over)
        w8 = quantize(w, how.w_axes, jnp.int8, parts=over)
        kept: Any = x.astype(how.dtype)
    else:
        over = how.parts.all
        x8 = quantize(x, None, jnp.float8_e4m3fn, parts=over)
        w8 = quantize(w, None, jnp.float8_e4m3fn, parts=over)
        kept = x8
    like = jnp.zeros((0,), x.dtype)  # carries the dtype to the backward pass
    y = _scaled_dot(x8, w8, how.x_axes, how.w_axes).astype(how.result)
    return y, (kept, w, like)


def _backward(
    how: Quantized, residuals: tuple[Any, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kept, w, like_x = residuals
    columns = tuple(a for a in range(w.ndim) if a not in how.w_axes)
    rows = tuple(range(dy.ndim - len(columns)))
    dy_axes = tuple(range(len(rows), dy.ndim))
    # A kernel may have its output axes first, as an embedding has: then so has its gradient.
    outputs_last = how.w_axes == tuple(range(len(how.w_axes)))
    if how.kind == "int8":
        over = how.parts.columns
        dy8 = quantize(dy, dy_axes, jnp.int8, parts=over)
        w8 = quantize(w, columns, jnp.int8, parts=over)
        low = dy.astype(how.dtype)
        a, b = (kept, low) if outputs_last else (low, kept)
        dw = lax.dot_general(a, b, ((rows, rows), ((), ())), preferred_element_type=how.result)
    else:
        over = how.parts.all
        dy8 = quantize(dy, None, jnp.float8_e5m2, parts=over)
        w8 = quantize(w, None, jnp.float8_e4m3fn, parts=over)
        a, b = (kept, dy8) if outputs_last else (dy8, kept)
        dw = _scaled_dot(a, b, rows, rows)
    dx = _scaled_dot(dy8, w8, dy_axes, columns)
    return dx.astype(like_x.dtype), dw.astype(w.dtype)


quantized_contract.defvjp(_forward, _backward)


def _scaled_dot(
    x8: tuple[jax.Array, jax.Array], w8: tuple[jax.Array, jax.Array], x_axes: Axes, w_axes: Axes
) -> jax.Array:
    """Contracts two quantised arrays in fp32; scales are constant along the contracted axes."""
    (x, x_scale), (w, w_scale) = x8, w8
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    sums = lax.dot_general(
        x,
        w,
        ((x_axes, w_axes), ((), ())),
        preferred_element_type=jnp.int32 if integer else jnp.float32,
    )
    rows = [n for a, n in enumerate(x_scale.shape) if a not in x_axes]
    columns = [n for a, n in enumerate(w_scale.shape) if a not in w_axes]
    x_scale = x_scale.reshape(*rows, *(1 for _ in columns))
    w_scale = w_scale.reshape(*(1 for _ in rows), *columns)
    return sums.astype(jnp.float32) * x_scale * w_scale
