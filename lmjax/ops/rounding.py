"""bfloat16 as the upper half of a float32: rounding by chance, and halves that join again.

Both work on the bits, and so no compiler that allows itself excess precision can undo them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def stochastic_round(x: jax.Array, rng: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up with the probability of x's place between its neighbours.

    So the mean of many roundings is x, to 2^-16 of the neighbours' distance.
    Source: Gupta et al., arXiv:1502.02551, section 3, on floating point: adding 16 random bits to
    the lower half carries into the upper with just that probability. The bits are a function of
    (rng, shape), not of the sharding.
    """
    bits = jax.random.bits(rng, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (lax.bitcast_convert_type(x, jnp.uint32) + bits) >> 16
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def split_halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 -> (the nearest bfloat16, the lower 16 bits of x as uint16); `join_halves` inverts.

    Of two nearest the one of greater magnitude is taken, which leaves the upper half known from
    the lower: it was rounded up if the lower one's first bit is set.
    """
    word = lax.bitcast_convert_type(x, jnp.uint32)
    upper = ((word + 0x8000) >> 16).astype(jnp.uint16)
    return lax.bitcast_convert_type(upper, jnp.bfloat16), word.astype(jnp.uint16)


def join_halves(nearest: jax.Array, lower: jax.Array) -> jax.Array:
    """The float32 whose halves `split_halves` gave, bit for bit."""
    upper = lax.bitcast_convert_type(nearest, jnp.uint16).astype(jnp.uint32)
    word = ((upper - (lower >> 15)) << 16) | lower
    return lax.bitcast_convert_type(word, jnp.float32)
