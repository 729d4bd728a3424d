"""Which experts a token goes to, with what weight, and what keeps them evenly used."""

# Shape legend: B batch, T length, D embed, E experts, k experts of a token.

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.core import Mean


def router_logits(x_BTD: jax.Array, kernel_DE: jax.Array) -> jax.Array:
    """x W in fp32 whatever the model's dtype: a rounded score sends a token elsewhere."""
    return lax.dot_general(
        x_BTD.astype(jnp.float32),
        kernel_DE.astype(jnp.float32),
        (((2,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )


def softmax_top_k(
    logits_BTE: jax.Array, k: int, *, normalise: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k likeliest experts, weighted by their probabilities among each other.

    Source: Mixtral, arXiv:2401.04088, section 2.1: a softmax over the chosen logits, which is
    the softmax over all, renormalised. Returns (experts_BTk int32, best first; weights_BTk, which
    sum to 1; probabilities_BTE). Without `normalise` weights are the probabilities among all
    experts, as in DeepSeekMoE, arXiv:2401.06066, equations 4 and 5.
    """
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    _, experts_BTk = lax.top_k(logits_BTE, k)
    weights_BTk = jnp.take_along_axis(probs_BTE, experts_BTk, axis=-1)
    if normalise:
        weights_BTk /= jnp.sum(weights_BTk, axis=-1, keepdims=True)
    return experts_BTk, weights_BTk, probs_BTE


def sigmoid_top_k(
    logits_BTE: jax.Array, k: int, *, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k experts of highest sigmoid, weighted by it among each other, times `scale`.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 13 to 15, with the factor `scale` of its
    released code; without the bias of its loss-free balancing (equation 16), and over all experts
    rather than those of a few nodes. Returns as `softmax_top_k`, with the scores normalised
    (equation 19) in place of probabilities.
    """
    scores_BTE = jax.nn.sigmoid(logits_BTE)
    _, experts_BTk = lax.top_k(logits_BTE, k)
    weights_BTk = jnp.take_along_axis(scores_BTE, experts_BTk, axis=-1)
    weights_BTk = scale * weights_BTk / jnp.sum(weights_BTk, axis=-1, keepdims=True)
    return experts_BTk, weights_BTk, scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)


def load_balance_loss(experts_BTk: jax.Array, probs_BTE: jax.Array) -> Mean:
    """Sum over experts of f_i P_i, 1 where all are used alike, the mean over tokens.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20; with k = 1 it is equation 4 of Switch
    Transformers, arXiv:2101.03961. f_i is the share of a sequence's choices that fell on expert i,
    times E, and P_i the mean over the sequence of its probability, by which alone gradients flow.
    Statistics are those of one row, so that its total adds over rows: microbatches, hosts and
    meshes change nothing. A row of packed documents counts as one sequence. Each of the T tokens of
    a row carries the row's loss.
    """
    B, T, E = probs_BTE.shape
    k = experts_BTk.shape[-1]
    ids_E = jnp.arange(E, dtype=experts_BTk.dtype)[None, None]
    hits_BTE = sum((experts_BTk[:, :, i, None] == ids_E).astype(jnp.float32) for i in range(k))
    share_BE = lax.stop_gradient(jnp.sum(hits_BTE, axis=1)) * (E / (k * T))
    loss_B = jnp.sum(share_BE * jnp.mean(probs_BTE, axis=1), axis=-1)
    return Mean(T * jnp.sum(loss_B), jnp.float32(B * T))


def router_z_loss(logits_BTE: jax.Array) -> Mean:
    """logsumexp(logits)^2, the mean over tokens; it keeps a router's logits small.

    Source: ST-MoE, arXiv:2202.08906, equation 5.
    """
    return Mean.of(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)))
