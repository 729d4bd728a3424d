"""Moments kept in bfloat16: any optax transformation, its state in half the memory."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.ops.rounding import stochastic_round

Moments = Literal["float32", "bfloat16"]


class RoundedState(NamedTuple):
    """The updates made so far, and the state of the transformation with bfloat16 for float32."""

    step: jax.Array
    rounded: Any


def in_bfloat16(method: optax.GradientTransformation) -> optax.GradientTransformation:
    """`method`, its float32 state kept in bfloat16 between steps; it computes in float32.

    Rounding is by chance (`ops.rounding.stochastic_round`). The nearest bfloat16 would not do: an
    average moves by (1 - b)(x - average) a step, and what is below 1/512 of the average is rounded
    away. A second moment with b2 = 0.999 could then never fall, as it loses at most 1/1000 a step.
    By chance each average keeps its mean; its noise is about 2^-9 / sqrt(1 - b^2) of it (0.6 % at
    b = 0.95, 4 % at 0.999), half that in the step size where it is the second moment's.

    The chance is drawn from the number of the step alone: the same on every mesh, and after a
    resume the same as without.
    """

    def init(params: Any) -> RoundedState:
        kept = jax.tree.map(_to_bfloat16, method.init(params))
        return RoundedState(jnp.zeros((), jnp.int32), kept)

    def update(updates: Any, state: RoundedState, params: Any = None) -> tuple[Any, RoundedState]:
        updates, new = method.update(updates, jax.tree.map(_to_float32, state.rounded), params)
        rng = jax.random.fold_in(jax.random.key(0), state.step)
        leaves, structure = jax.tree.flatten(new)
        kept = [
            stochastic_round(x, jax.random.fold_in(rng, i)) if old.dtype == jnp.bfloat16 else x
            for i, (x, old) in enumerate(zip(leaves, jax.tree.leaves(state.rounded), strict=True))
        ]
        return updates, RoundedState(state.step + 1, jax.tree.unflatten(structure, kept))

    return optax.GradientTransformation(init, update)


def _to_bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


def _to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
