"""A checksum of arrays: of what they hold and where, of nothing of how they lie on devices.

Each element's bits are mixed with its place in the whole array, and the results are summed modulo
2^32. A sum is the same in any order, and so the checksum is the same on any mesh; the mixing is a
bijection of the bits, and so a change of any one element changes it for certain. Other changes go
unnoticed with a probability of 2^-63. It guards against damage, not against forgery.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NARROW = {"bool": 1, "int2": 3, "uint2": 3, "int4": 15, "uint4": 15}  # dtype -> mask of its bits


def checksum(x: jax.Array, start: Sequence[Any] = ()) -> jax.Array:
    """The checksum of an array, uint32[2]: under jit, of the whole of a sharded one, in one pass.

    Source: the mixing is the finaliser of MurmurHash3 (A. Appleby, public domain). Element w at
    place (i, j, ...) gives a = mix(w + p), p = mix(i + seed_0) + mix(j + seed_1) + ... + seed_rank;
    the two sums are of a and of a times the odd number p | 1. An element of 64 bits counts as two
    along a further axis, a scalar as an array of one.

    Args:
      x: of booleans, integers or floats.
      start: where, in a larger array of which `x` is a part, it begins along each axis: the
        checksums of the parts add (modulo 2^32) to that of the whole.

    Raises:
      TypeError: for complex numbers, random keys and floats of four bits.
    """
    words = _words(x)
    begin = (*start, *(0,) * (words.ndim - len(start)))
    place = jnp.full(words.shape, _seed(words.ndim))
    for axis, first in enumerate(begin):
        index = lax.broadcasted_iota(jnp.uint32, words.shape, axis) + jnp.uint32(first)
        place += _mix(index + _seed(axis))
    mixed = _mix(words + place)
    # One reduction of both: two would each make what they sum.
    sums = lax.reduce(
        (mixed, mixed * (place | 1)), (jnp.uint32(0),) * 2, _add, tuple(range(words.ndim))
    )
    return jnp.stack(sums)


def _seed(axis: int) -> np.uint32:
    """Another number for each axis (multiples of 2^32 divided by the golden ratio)."""
    return np.uint32((axis + 1) * 0x9E3779B9 & 0xFFFFFFFF)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of the result depends on every bit of x."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def _add(x: Sequence[jax.Array], y: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(a + b for a, b in zip(x, y, strict=True))


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32."""
    x = jnp.atleast_1d(x)
    if x.dtype.name in _NARROW:
        return x.astype(jnp.uint32) & _NARROW[x.dtype.name]
    known = jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)
    if not known or "float4" in x.dtype.name:
        raise TypeError(f"no checksum of {x.dtype}: only of booleans, integers and floats.")
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
