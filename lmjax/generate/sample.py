"""From logits to the next token.

B batch, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(
    logits_BV: jax.Array, rng: jax.Array, *, temperature: jax.Array, top_k: jax.Array
) -> jax.Array:
    """Draws a token a row: greedy at temperature 0, else from softmax(logits / temperature).

    Only the `top_k` likeliest tokens can be drawn (all where it is 0). Both are arrays, so that
    another value compiles nothing.
    """
    V = logits_BV.shape[-1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    kth_B1 = jnp.take(sorted_BV, jnp.where(top_k > 0, jnp.minimum(top_k, V), V) - 1, axis=-1)[
        :, None
    ]
    kept_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    drawn_B = jax.random.categorical(rng, kept_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)
