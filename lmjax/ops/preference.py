"""Losses of preferences between texts, from the log-probabilities of whole texts."""

# B batch, T length, D embed.

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lmjax.core import Unembedding
from lmjax.ops.losses import cross_entropy


def token_log_probs(
    hidden_BTD: jax.Array,
    unembedding: Unembedding,
    targets_BT: jax.Array,
    *,
    vocab_chunk: int = 0,
) -> jax.Array:
    """Log-probability of each target in nats, float32 [B, T]; see `losses.cross_entropy`."""
    return -cross_entropy(hidden_BTD, unembedding, targets_BT, vocab_chunk=vocab_chunk)[0]


def sequence_log_probs(log_probs_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Log-probability of each row's text, [B]: the sum over the targets that its weights choose."""
    return jnp.sum(log_probs_BT * weights_BT, axis=1)


def mean_log_probs(log_probs_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Likewise the mean over the chosen targets, [B]; 0 of a row without any."""
    return sequence_log_probs(log_probs_BT, weights_BT) / lengths(weights_BT)


def lengths(weights_BT: jax.Array) -> jax.Array:
    """How many targets a row's weights choose, at least 1, [B]."""
    return jnp.maximum(jnp.sum(weights_BT, axis=1), 1)


def dpo_loss(margin_B: jax.Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """The loss of direct preference optimization of each pair, in nats.

    Source: Rafailov et al., arXiv:2305.18290, equation 7. With `label_smoothing` e the preference
    is taken to be wrong with that probability (their "conservative DPO", Mitchell 2023).

    Args:
      margin_B: log (policy / reference) of the chosen text less that of the rejected.
      beta: how much a nat of it counts.
      label_smoothing: from 0 to below 1/2.
    """
    e, reward_B = label_smoothing, beta * margin_B
    return -(1 - e) * jax.nn.log_sigmoid(reward_B) - e * jax.nn.log_sigmoid(-reward_B)


def ipo_loss(margin_B: jax.Array, *, beta: float) -> jax.Array:
    """The squared loss of identity preference optimization of each pair.

    Source: Azar et al., arXiv:2310.12036, equation 17, `beta` being its tau. As its authors do, the
    margin is of mean log-probabilities of tokens, so that long texts count as short ones do.
    """
    return jnp.square(margin_B - 1 / (2 * beta))


def log_odds_ratio(chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
    """log of odds(chosen) / odds(rejected), where odds(p) = p / (1 - p), of log-probabilities.

    Source: Hong et al., arXiv:2403.07691, equations 4 and 5. Log-probabilities are below 0.
    """
    return chosen_B - rejected_B - (_log1mexp(chosen_B) - _log1mexp(rejected_B))


def kto_loss(
    log_ratio_B: jax.Array,
    labels_B: jax.Array,
    kl: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """The loss of Kahneman-Tversky optimization of each text.

    Source: Ethayarajh et al., arXiv:2402.01306, equation 8; as trl does, each text's loss is its
    weight less its value.

    Args:
      log_ratio_B: log (policy / reference) of each text.
      labels_B: 1 where it is desirable, 0 where not.
      kl: the reference point z_0, a scalar of 0 or more, through which no gradient goes.
      beta: how much a nat counts.
      desirable_weight: of a desirable text.
      undesirable_weight: of an undesirable one.
    """
    desirable_B = desirable_weight * jax.nn.sigmoid(beta * (kl - log_ratio_B))
    undesirable_B = undesirable_weight * jax.nn.sigmoid(beta * (log_ratio_B - kl))
    return jnp.where(labels_B > 0, desirable_B, undesirable_B)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) of x < 0: near 0 by expm1, far from it by log1p (Maechler 2012)."""
    near = x > -math.log(2)
    small = jnp.where(near, x, -1.0)
    large = jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
