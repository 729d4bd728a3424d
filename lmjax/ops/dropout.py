"""Dropout that spends half a random word on an element."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_LEVELS = 1 << 16


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the others so that the mean stays.

    Source: Srivastava et al., JMLR 15 (2014), in the inverted form. The keep probability is
    rounded to a multiple of 1/65536, as is the scale, because one 32-bit word serves two elements
    of the last axis: drawing the words is what dropout costs. The mask is a function of (rng,
    shape), not of the sharding.
    """
    if rate == 0:
        return x
    keep, scale = dropout_mask(rng, x.shape, rate)
    return jnp.where(keep, x * scale, jnp.zeros_like(x))


def dropout_mask(
    rng: jax.Array | None, shape: tuple[int, ...], rate: float
) -> tuple[jax.Array, float]:
    """(which elements to keep, what to multiply them by); see `dropout`."""
    threshold = round(rate * _LEVELS)
    if not 0 <= rate < 1 or threshold == _LEVELS:
        raise ValueError(f"dropout rate is {rate}; it must be from 0 to {1 - 1 / _LEVELS}")
    if rng is None:
        raise ValueError(f"dropout with rate {rate} needs an rng")
    return _half_words(rng, shape) >= threshold, _LEVELS / (_LEVELS - threshold)


def _half_words(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint16 of a shape, two to a random word."""
    *leading, last = shape
    words = jax.random.bits(rng, (*leading, (last + 1) // 2), jnp.uint32)
    halves = lax.bitcast_convert_type(words, jnp.uint16)
    return halves.reshape((*leading, 2 * words.shape[-1]))[..., :last]
