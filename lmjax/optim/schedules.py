"""Learning rates as functions of the optimizer step; each warms up linearly from 0 to its peak.

The step counts from 0: with `warmup_steps` w the first step uses peak / w and step w - 1 the peak.
A decay leaves the peak after the step at which it begins, and arrives with step `steps`, one past
the last.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from lmjax.errors import UserError

MAX_STEPS = 2**31 - 1


def constant(*, peak: float, warmup_steps: int = 0) -> optax.Schedule:
    """The peak throughout."""
    _check(peak, warmup_steps)
    return _warmed(lambda step: jnp.asarray(peak, jnp.float32), peak, warmup_steps)


def linear(
    *, peak: float, steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> optax.Schedule:
    """A straight line from the peak to `final_fraction` of it."""
    _check(peak, warmup_steps, steps, final_fraction)
    decay = optax.linear_schedule(peak, peak * final_fraction, steps - warmup_steps, warmup_steps)
    return _warmed(decay, peak, warmup_steps)


def cosine(
    *, peak: float, steps: int, warmup_steps: int = 0, final_fraction: float = 0.1
) -> optax.Schedule:
    """Half a cosine from the peak to `final_fraction` of it.

    Source: Loshchilov & Hutter, "SGDR", arXiv:1608.03983, equation 5, without restarts.
    """
    _check(peak, warmup_steps, steps, final_fraction)
    decay = optax.cosine_decay_schedule(peak, steps - warmup_steps, final_fraction)
    return _warmed(lambda step: decay(jnp.maximum(step - warmup_steps, 0)), peak, warmup_steps)


def wsd(
    *,
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: int,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Warm up, stay at the peak, and go down in a straight line over the last `decay_steps`.

    Source: Hu et al., "MiniCPM", arXiv:2404.06395, section 4.
    """
    _check(peak, warmup_steps, steps, final_fraction)
    if not 0 < decay_steps <= steps - warmup_steps:
        raise UserError(
            f"decay_steps is {decay_steps}: must be from 1 to steps - warmup_steps = "
            f"{steps - warmup_steps}."
        )
    decay = optax.linear_schedule(peak, peak * final_fraction, decay_steps, steps - decay_steps)
    return _warmed(decay, peak, warmup_steps)


def inverse_sqrt(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """peak * sqrt(warmup_steps / step) after the warm-up.

    Source: Vaswani et al., arXiv:1706.03762, equation 3, with the peak given outright.
    """
    if warmup_steps < 1:
        raise UserError(f"warmup_steps is {warmup_steps}: inverse_sqrt needs at least 1.")
    _check(peak, warmup_steps)
    return _warmed(
        lambda step: peak * jnp.sqrt(warmup_steps / jnp.maximum(step + 1, 1)), peak, warmup_steps
    )


def noam(*, dim: int, warmup_steps: int, scale: float = 1.0) -> optax.Schedule:
    """scale * dim^-0.5 * min(step^-0.5, step * warmup_steps^-1.5), steps counted from 1.

    Source: Vaswani et al., arXiv:1706.03762, equation 3, where the scale is 1: `inverse_sqrt` whose
    peak is scale / sqrt(dim * warmup_steps).

    Args:
      dim: the model's width.
    """
    if dim < 1 or warmup_steps < 1:
        raise UserError(f"dim is {dim} and warmup_steps {warmup_steps}: give at least 1 of both.")
    return inverse_sqrt(peak=scale * (dim * warmup_steps) ** -0.5, warmup_steps=warmup_steps)


def _warmed(schedule: optax.Schedule, peak: float, warmup_steps: int) -> optax.Schedule:
    def rate(step: jax.Array) -> jax.Array:
        warm = peak * (step + 1) / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, warm, schedule(step)).astype(jnp.float32)

    return rate


def _check(
    peak: float, warmup_steps: int, steps: int | None = None, final_fraction: float = 0.0
) -> None:
    if not 0 < peak < math.inf:
        raise UserError(f"peak is {peak}: a learning rate must be positive and finite.")
    if warmup_steps < 0:
        raise UserError(f"warmup_steps is {warmup_steps}: must not be negative.")
    if max(warmup_steps, steps or 0) > MAX_STEPS:
        raise UserError(
            f"steps is {steps} and warmup_steps {warmup_steps}: at most {MAX_STEPS}, as a step is "
            "counted in 32 bits."
        )
    if steps is not None and warmup_steps >= steps:
        raise UserError(
            f"warmup_steps {warmup_steps} is not below steps {steps}: the schedule would never "
            "reach its decay. Lower the first or raise the second."
        )
    if not 0 <= final_fraction <= 1:
        raise UserError(f"final_fraction is {final_fraction}: must be from 0 to 1.")
