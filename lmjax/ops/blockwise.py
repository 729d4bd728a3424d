"""Weights in few bits: blocks along the inputs of a product, each output's apart, with one scale.

A block holds levels between -1 and 1 and its largest absolute weight, the scale:

| kind | levels | bits |
|---|---|---|
| int8 | k / 127, k a whole number | 8 |
| int4 | k / 7, k a whole number | 4, two to a byte |
| nf4 | the 16 of QLoRA, at equal shares of a normal distribution | 4, two to a byte |
| fp8 | floats of e4m3 / 448 | 8 |

A scale is a float16, rounded up: blocks of 64 take 16 / 64 = 0.25 bits a weight beside the levels.
Sources: absmax scaling of blocks: Dettmers et al., arXiv:2110.02861, section 2.1; nf4: Dettmers et
al., "QLoRA", arXiv:2305.14314, section 3 and appendix E (whose second quantisation, that of the
scales, is not here); e4m3: Micikevicius et al., arXiv:2209.05433.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lmjax.errors import UserError, did_you_mean

Kind = Literal["int8", "int4", "nf4", "fp8"]
KINDS: tuple[str, ...] = get_args(Kind)
BLOCK = 64

# QLoRA, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
_PACKED = ("int4", "nf4")  # two to a byte


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale"),
    meta_fields=("kind", "block", "axis"),
)
@dataclass(frozen=True)
class Blocks:
    """An array in few bits.

    Args:
      data: the levels: of its shape, int8 of 'int8', uint8 (the bits) of 'fp8'; uint8 of half the
        size along `axis` of the others, rows 2 i and 2 i + 1 in the lower and upper half of byte i.
      scale: float16, of its shape but for `axis`, which has a number for each block.
      kind: see the module.
      block: how many along `axis` share a scale; the last block may be shorter.
      axis: along which blocks lie.
    """

    data: Any
    scale: Any
    kind: str
    block: int
    axis: int


def check(kind: str, block: int) -> None:
    """Raises UserError for a kind that there is not, and for a block of less than two."""
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}." + did_you_mean(str(kind), KINDS))
    if block < 2:
        raise UserError(f"block is {block}: must be at least 2; 64 is common.")


def is_packed(kind: str) -> bool:
    """Whether two weights share a byte: then the size along the blocks is even."""
    return kind in _PACKED


def bits_per_weight(kind: str, block: int) -> float:
    """With the scales, of sizes that the block divides."""
    return (4 if is_packed(kind) else 8) + 16 / block


def quantise(w: jax.Array, *, kind: str, block: int = BLOCK, axis: int = 0) -> Blocks:
    """The nearest levels of an array, with scales that reach its largest weights.

    The error of a weight is at most half the distance of the two levels around it, times the scale.
    Weights above 65,504 are cut. Raises UserError as `check`, and for an odd size of a packed kind.
    """
    check(kind, block)
    axis %= w.ndim
    size = w.shape[axis]
    if is_packed(kind) and size % 2:
        raise UserError(f"{kind} packs two weights into a byte, and axis {axis} has {size}.")
    w = w.astype(jnp.float32)
    padding = [(0, -size % block if a == axis else 0) for a in range(w.ndim)]
    shape = (*w.shape[:axis], -1, block, *w.shape[axis + 1 :])
    largest = jnp.max(jnp.abs(jnp.pad(w, padding)).reshape(shape), axis=axis + 1)
    scale = _up(jnp.minimum(largest, float(jnp.finfo(jnp.float16).max)))
    each = _each(scale, block, axis, size)
    level = jnp.where(each > 0, w / jnp.where(each > 0, each, 1), 0)
    return Blocks(_encode(jnp.clip(level, -1, 1), kind, axis), scale, kind, block, axis)


def dequantise(blocks: Blocks, *, first: jax.Array | None = None) -> jax.Array:
    """The array in float32: level times scale.

    Args:
      first: where the scales are those of a larger array, of which `data` is a part along its
        blocks' axis: the index at which it begins there.
    """
    level = _decode(blocks.data, blocks.kind, blocks.axis)
    size = level.shape[blocks.axis]
    return level * _each(blocks.scale, blocks.block, blocks.axis, size, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def rounded(w: jax.Array, kind: str, block: int, axis: int) -> jax.Array:
    """`dequantise(quantise(w))`, with the gradient of the identity: straight-through.

    Source: Bengio et al., arXiv:1308.3432, section 4.
    """
    return dequantise(quantise(w, kind=kind, block=block, axis=axis)).astype(w.dtype)


rounded.defvjp(
    lambda w, kind, block, axis: (rounded(w, kind, block, axis), None),
    lambda kind, block, axis, _, gradient: (gradient,),
)


def multiply(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    blocks: Blocks,
    whole: Callable[[Blocks], jax.Array] = dequantise,
) -> jax.Array:
    """`product(x, whole(blocks))`, of which nothing is kept for the backward pass but the blocks.

    The array is made once more for the gradient of x; there is none of the blocks.

    Args:
      product: linear in x.
      whole: makes the array.
    """
    shape, dtype = x.shape, x.dtype

    @jax.custom_vjp
    def run(x: jax.Array, data: jax.Array, scale: jax.Array) -> jax.Array:
        kept = Blocks(data, scale, blocks.kind, blocks.block, blocks.axis)
        return product(x, whole(kept))

    def forward(x: jax.Array, data: jax.Array, scale: jax.Array) -> tuple[jax.Array, Any]:
        return run(x, data, scale), (data, scale)

    def backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, None, None]:
        # Without the barrier the compiler would find the array in the forward pass, and keep it.
        data, scale, dy = lax.optimization_barrier((*kept, dy))
        w = whole(Blocks(data, scale, blocks.kind, blocks.block, blocks.axis))
        # The product is linear in x: at any x the gradient is the same.
        _, pullback = jax.vjp(lambda x: product(x, w), jnp.zeros(shape, dtype))
        return pullback(dy)[0], None, None

    run.defvjp(forward, backward)
    return run(x, blocks.data, blocks.scale)


def _up(x: jax.Array) -> jax.Array:
    """The float16 at or above positive numbers, but for their last bits in float32.

    So the scales of what was dequantised are those that it had.
    """
    near = x.astype(jnp.float16)
    bits = lax.bitcast_convert_type(near, jnp.uint16) + jnp.uint16(1)
    above = lax.bitcast_convert_type(bits, jnp.float16)
    return jnp.where(near.astype(jnp.float32) < x * np.float32(1 - 1e-6), above, near)


def _each(
    scale: jax.Array, block: int, axis: int, size: int, first: jax.Array | None = None
) -> jax.Array:
    """The scale of each of `size` weights along the axis, from the first of them on."""
    each = jnp.repeat(scale.astype(jnp.float32), block, axis=axis)
    if first is not None:
        return lax.dynamic_slice_in_dim(each, first, size, axis=axis)
    return each if each.shape[axis] == size else lax.slice_in_dim(each, 0, size, axis=axis)


def _step(kind: str) -> np.float32:
    # As a factor: compilers are free to divide by a constant in several ways.
    return np.float32(1 / _LARGEST[kind])


def _encode(level: jax.Array, kind: str, axis: int) -> jax.Array:
    if kind == "int8":
        return jnp.round(level * _LARGEST[kind]).astype(jnp.int8)
    if kind == "fp8":
        low = (level * _LARGEST[kind]).astype(jnp.float8_e4m3fn)
        return lax.bitcast_convert_type(low, jnp.uint8)
    if kind == "int4":
        code = (jnp.round(level * _LARGEST[kind]) + 8).astype(jnp.uint8)
    else:
        between = np.add(NF4[1:], NF4[:-1]).astype(np.float32) / 2
        code = sum(((level > m).astype(jnp.uint8) for m in between), jnp.uint8(0))
    shape = (*code.shape[:axis], -1, 2, *code.shape[axis + 1 :])
    code = code.reshape(shape)
    low, high = (lax.index_in_dim(code, i, axis + 1, keepdims=False) for i in (0, 1))
    return low | (high << 4)


def _decode(data: jax.Array, kind: str, axis: int) -> jax.Array:
    if kind == "int8":
        return data.astype(jnp.float32) * _step(kind)
    if kind == "fp8":
        low = lax.bitcast_convert_type(data, jnp.float8_e4m3fn)
        return low.astype(jnp.float32) * _step(kind)
    code = jnp.stack([data & 15, data >> 4], axis=axis + 1)
    code = code.reshape(*data.shape[:axis], -1, *data.shape[axis + 1 :])
    if kind == "int4":
        return (code.astype(jnp.float32) - 8) * _step(kind)
    return jnp.asarray(NF4, jnp.float32).at[code].get(mode="promise_in_bounds")
