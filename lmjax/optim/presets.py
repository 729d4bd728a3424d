"""Optimizers as chains of optax transformations, the same frame around each.

clip by global norm -> the method -> decoupled weight decay on the parameters that a regex names ->
learning rate -> optional exponential average of the parameters.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.errors import UserError, did_you_mean
from lmjax.optim.factored import scale_by_factored_rms
from lmjax.optim.rounded import Moments, in_bfloat16
from lmjax.sharding import Boxed

KERNELS = r"(kernel|table)$"  # matrices and embeddings: no bias, no scale


def adamw(
    *,
    learning_rate: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    decay: str = KERNELS,
    clip_norm: float | None = 1.0,
    average: float | None = None,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay.

    Source: Loshchilov & Hutter, arXiv:1711.05101, algorithm 2; Kingma & Ba, arXiv:1412.6980.

    Args:
      learning_rate: of the optimizer step.
      decay: regex over parameter paths; those in which it is found decay.
      clip_norm: the gradient's global norm is at most this; None does not clip.
      average: decay of an exponential average of the parameters, which evaluation then uses.
      moments: the dtype in which both are kept between steps; see `rounded.in_bfloat16`.
    """
    _check(b1=b1, b2=b2)
    if not 0 < epsilon < math.inf:
        raise UserError(f"epsilon is {epsilon}: must be positive and finite.")
    method = _kept(optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon), moments)
    return _chain(method, learning_rate, weight_decay, decay, clip_norm, average)


def sgd(
    *,
    learning_rate: optax.Schedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: str = KERNELS,
    clip_norm: float | None = None,
    average: float | None = None,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum; weight decay is decoupled. See `adamw`."""
    _check(momentum=momentum)
    method = _kept(optax.trace(decay=momentum, nesterov=nesterov), moments)
    return _chain(method, learning_rate, weight_decay, decay, clip_norm, average)


def adafactor(
    *,
    learning_rate: optax.Schedule,
    decay_rate: float = 0.8,
    min_dim_factored: int = 128,
    clip_update: float = 1.0,
    weight_decay: float = 0.0,
    decay: str = KERNELS,
    clip_norm: float | None = None,
    average: float | None = None,
) -> optax.GradientTransformation:
    """Adam's second moment kept as row and column means of each matrix; no first moment.

    Source: Shazeer & Stern, arXiv:1804.04235, algorithms 4 and 5, with the learning rate given
    outright rather than scaled by the parameter's size. See `adamw` and `factored`.
    """
    _check(decay_rate=decay_rate)
    if not clip_update > 0:
        raise UserError(f"clip_update is {clip_update}: must be positive.")
    method = scale_by_factored_rms(
        decay_rate=decay_rate, min_dim_factored=min_dim_factored, clip=clip_update
    )
    return _chain(method, learning_rate, weight_decay, decay, clip_norm, average)


def lion(
    *,
    learning_rate: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1.0,
    decay: str = KERNELS,
    clip_norm: float | None = 1.0,
    average: float | None = None,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """The sign of an interpolated momentum.

    Source: Chen et al., arXiv:2302.06675, algorithm 2: wants a learning rate 3-10 times smaller and
    a weight decay as much larger than Adam's. See `adamw`.
    """
    _check(b1=b1, b2=b2)
    method = _kept(optax.scale_by_lion(b1=b1, b2=b2), moments)
    return _chain(method, learning_rate, weight_decay, decay, clip_norm, average)


class AverageState(NamedTuple):
    """An exponential average of the parameters, which evaluation reads by this field's name."""

    averaged_params: Any


def average_params(decay: float) -> optax.GradientTransformation:
    """Keeps average = decay * average + (1 - decay) * (parameters after the update).

    It starts at the initial parameters. Stands last in a chain; updates pass through unchanged.
    """

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        average = optax.incremental_update(new, state.averaged_params, 1 - decay)
        return updates, AverageState(average)

    return optax.GradientTransformation(AverageState, update)


class ScheduleState(NamedTuple):
    """The updates made so far, and the learning rate of the last, which the trainer reports."""

    step: jax.Array
    learning_rate: jax.Array


def scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Multiplies updates by minus the learning rate of this step."""

    def init(params: Any) -> ScheduleState:
        del params
        return ScheduleState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Any, state: ScheduleState, params: Any = None) -> tuple[Any, ScheduleState]:
        del params
        rate = schedule(state.step)
        updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates)
        return updates, ScheduleState(state.step + 1, rate)

    return optax.GradientTransformation(init, update)


def _chain(
    method: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    weight_decay: float,
    decay: str,
    clip_norm: float | None,
    average: float | None,
) -> optax.GradientTransformation:
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay is {weight_decay}: must not be negative, and finite.")
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm is {clip_norm}: must be positive, or None for no clipping.")
    if average is not None:
        _check(average=average)
    try:
        pattern = re.compile(decay)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"decay is {decay!r}, which is no regular expression: {error}.") from error
    links = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    links.append(method)
    if weight_decay:
        links.append(optax.add_decayed_weights(weight_decay, lambda p: _matches(pattern, p)))
    links.append(scale_by_schedule(learning_rate))
    if average:
        links.append(average_params(average))
    return optax.chain(*links)


def _kept(method: optax.GradientTransformation, moments: Moments) -> optax.GradientTransformation:
    if moments not in ("float32", "bfloat16"):
        raise UserError(
            f"moments is {moments!r}." + did_you_mean(str(moments), ("float32", "bfloat16"))
        )
    return in_bfloat16(method) if moments == "bfloat16" else method


def _matches(pattern: re.Pattern[str], params: Any) -> Any:
    """True for each parameter in whose path the pattern is found."""

    def matches(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return pattern.search(name) is not None

    return jax.tree_util.tree_map_with_path(matches, params, is_leaf=lambda x: isinstance(x, Boxed))


def _check(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise UserError(f"{name} is {value}: must be at least 0 and below 1.")
