"""From logits to the next token.

B batch, V vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lmjax.errors import UserError

LARGEST = 2**31 - 1  # what int32 holds


def check_settings(*, max_tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Raises UserError for numbers that nothing can be drawn with."""
    if not (0 <= max_tokens <= LARGEST and 0 <= temperature < math.inf and 0 <= top_k <= LARGEST):
        raise UserError(
            f"max_tokens is {max_tokens}, temperature {temperature} and top_k {top_k}: "
            "none may be negative, or beyond 32 bits."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}: must be from 0 to 2**32 - 1.")


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
