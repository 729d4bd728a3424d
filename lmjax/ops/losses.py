"""Cross-entropy of a language model, from hidden states so that logits need never be held whole."""

# Shape legend: B batch, T length, D embed, V vocabulary with padding, C one of N vocabulary chunks.

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.core import Unembedding
from lmjax.ops.matmul import contract, dot

# A maximum to start from and to fall back to: -inf would give NaN, as -inf - -inf.
_VERY_NEGATIVE = -1e30


def logits(hidden_BTD: jax.Array, unembedding: Unembedding) -> jax.Array:
    """Scores of every token, logits_BTV in fp32; columns of padding are -inf."""
    logits_BTV = contract(
        hidden_BTD,
        unembedding.weights_VD,
        dtype=unembedding.dtype,
        axes=((hidden_BTD.ndim - 1,), (1,)),
        result="float32",
    )
    return _mask_padding(logits_BTV, unembedding.vocab_size, 0, 1)


def cross_entropy(
    hidden_BTD: jax.Array,
    unembedding: Unembedding,
    targets_BT: jax.Array,
    *,
    vocab_chunk: int = 0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target in nats, and the z-loss of each: (nll_BT, z_BT), fp32.

    Source: z_BT is z_loss * logsumexp(logits)^2 of PaLM, arXiv:2204.02311, section 5. With
    `vocab_chunk` > 0 about that many logits a token are held, forward or backward, at the cost
    of one more product; the online logsumexp is Milakov & Gimelshein, arXiv:1805.02867.
    """
    if vocab_chunk < 0:
        raise ValueError(f"vocab_chunk is {vocab_chunk}; it must be 0 (no chunks) or positive")
    weights_VD = unembedding.weights_VD
    num_chunks = -(-weights_VD.shape[0] // vocab_chunk) if vocab_chunk else 1
    loss = _loss_whole if num_chunks == 1 else partial(_loss_chunked, num_chunks)
    static = (unembedding.vocab_size, jnp.dtype(unembedding.dtype), z_loss)
    return loss(static, hidden_BTD, weights_VD, targets_BT)


def _mask_padding(logits_BTC: jax.Array, vocab_size: int, chunk: Any, num_chunks: int) -> jax.Array:
    if num_chunks == 1 and logits_BTC.shape[-1] == vocab_size:
        return logits_BTC
    ids = _ids(logits_BTC, chunk, num_chunks)
    return jnp.where(ids < vocab_size, logits_BTC, -jnp.inf)


def _sum_exp(logits_BTC: jax.Array, top_BT1: jax.Array) -> jax.Array:
    # Two loops: XLA:CPU computes an exponential inside a reduction one element at a time.
    weights_BTC = lax.optimization_barrier(jnp.exp(logits_BTC - top_BT1))
    return jnp.sum(weights_BTC, axis=-1)


def _ids(logits_BTC: jax.Array, chunk: Any, num_chunks: int) -> jax.Array:
    """Token ids of the columns of chunk `chunk`, which holds every num_chunks-th token."""
    column = lax.broadcasted_iota(jnp.int32, logits_BTC.shape, logits_BTC.ndim - 1)
    return column * num_chunks + chunk


def _label_logits(hidden_BTD: jax.Array, weights_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The target's logit from its own row: a gather in logits_BTV would not shard over V."""
    rows_BTD = jnp.take(weights_VD, targets_BT, axis=0, mode="clip").astype(hidden_BTD.dtype)
    return jnp.sum(hidden_BTD.astype(jnp.float32) * rows_BTD.astype(jnp.float32), axis=-1)


def _coefficients(
    z_loss: float, grads: tuple[jax.Array, jax.Array], lse_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(a, b) such that the gradient of the logits is a * (softmax - onehot) + b * onehot."""
    nll_grad, z_grad = grads
    b = 2 * z_loss * lse_BT * z_grad
    return (nll_grad + b)[..., None], b[..., None]


Static = tuple[int, jnp.dtype, float]  # vocabulary without padding, dtype of operands, z-loss
Losses = tuple[jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_whole(
    static: Static, hidden_BTD: jax.Array, weights_VD: jax.Array, targets_BT: jax.Array
) -> Losses:
    return _forward_whole(static, hidden_BTD, weights_VD, targets_BT)[-1]


def _forward_whole(
    static: Static, hidden_BTD: jax.Array, weights_VD: jax.Array, targets_BT: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array, Losses]:
    vocab_size, operand, z_loss = static
    hidden_BTD, weights_VD = hidden_BTD.astype(operand), weights_VD.astype(operand)
    logits_BTV = dot(hidden_BTD, weights_VD, (2,), (1,))
    logits_BTV = _mask_padding(logits_BTV, vocab_size, 0, 1)
    top_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    lse_BT = jnp.log(_sum_exp(logits_BTV, top_BT1)) + top_BT1[..., 0]
    nll_BT = lse_BT - _label_logits(hidden_BTD, weights_VD, targets_BT)
    losses = nll_BT, z_loss * jnp.square(lse_BT)
    return (hidden_BTD, weights_VD), logits_BTV, lse_BT, losses


def _loss_whole_fwd(
    static: Static, hidden_BTD: jax.Array, weights_VD: jax.Array, targets_BT: jax.Array
) -> tuple[Losses, tuple[Any, ...]]:
    _, operand, _ = static
    operands, logits_BTV, lse_BT, losses = _forward_whole(
        static, hidden_BTD, weights_VD, targets_BT
    )
    # The gradient but for a factor per token, so that the backward is two products and no more.
    error_BTV = jnp.exp(logits_BTV - lse_BT[..., None])
    error_BTV = (error_BTV - _onehot(error_BTV, targets_BT, 0, 1)).astype(operand)
    like = jnp.zeros((0,), hidden_BTD.dtype), jnp.zeros((0,), weights_VD.dtype)
    return losses, (*operands, targets_BT, error_BTV, lse_BT, like)


def _onehot(logits_BTC: jax.Array, targets_BT: jax.Array, chunk: Any, num_chunks: int) -> jax.Array:
    ids = _ids(logits_BTC, chunk, num_chunks)
    return (ids == targets_BT[..., None].astype(jnp.int32)).astype(jnp.float32)


def _loss_whole_bwd(
    static: Static, residuals: tuple[Any, ...], grads: Losses
) -> tuple[jax.Array, jax.Array, None]:
    _, operand, z_loss = static
    hidden_BTD, weights_VD, targets_BT, error_BTV, lse_BT, (like_hidden, like_weights) = residuals
    a, b = _coefficients(z_loss, grads, lse_BT)
    if z_loss:
        onehot_BTV = _onehot(error_BTV, targets_BT, 0, 1)
        error_BTV = (a * error_BTV.astype(jnp.float32) + b * onehot_BTV).astype(operand)
        a = jnp.ones_like(a)
    dhidden_BTD = a * dot(error_BTV, weights_VD, (2,), (0,))
    scaled_BTD = (a * hidden_BTD.astype(jnp.float32)).astype(operand)
    dweights_VD = dot(error_BTV, scaled_BTD, (0, 1), (0, 1))
    return dhidden_BTD.astype(like_hidden.dtype), dweights_VD.astype(like_weights.dtype), None


_loss_whole.defvjp(_loss_whole_fwd, _loss_whole_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_chunked(
    num_chunks: int,
    static: Static,
    hidden_BTD: jax.Array,
    weights_VD: jax.Array,
    targets_BT: jax.Array,
) -> Losses:
    return _loss_chunked_fwd(num_chunks, static, hidden_BTD, weights_VD, targets_BT)[0]


def _split(weights_VD: jax.Array, num_chunks: int) -> jax.Array:
    """weights_CND: chunk n is every N-th token, so that a sharded V leaves C sharded alike."""
    V, D = weights_VD.shape
    return jnp.pad(weights_VD, ((0, -V % num_chunks), (0, 0))).reshape(-1, num_chunks, D)


def _chunk_logits(
    static: Static, hidden_BTD: jax.Array, weights_CND: jax.Array, chunk: jax.Array
) -> tuple[jax.Array, jax.Array]:
    vocab_size, operand, _ = static
    weights_CD = lax.dynamic_index_in_dim(weights_CND, chunk, axis=1, keepdims=False)
    weights_CD = weights_CD.astype(operand)
    logits_BTC = dot(hidden_BTD, weights_CD, (2,), (1,))
    return weights_CD, _mask_padding(logits_BTC, vocab_size, chunk, weights_CND.shape[1])


def _loss_chunked_fwd(
    num_chunks: int,
    static: Static,
    hidden_BTD: jax.Array,
    weights_VD: jax.Array,
    targets_BT: jax.Array,
) -> tuple[Losses, tuple[jax.Array, ...]]:
    _, operand, z_loss = static
    low_BTD = hidden_BTD.astype(operand)
    weights_CND = _split(weights_VD, num_chunks)

    def add_chunk(
        carry: tuple[jax.Array, jax.Array], chunk: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        top_BT, sum_BT = carry
        _, logits_BTC = _chunk_logits(static, low_BTD, weights_CND, chunk)
        new_top_BT = jnp.maximum(top_BT, jnp.max(logits_BTC, axis=-1))
        sum_BT = sum_BT * jnp.exp(top_BT - new_top_BT)
        sum_BT = sum_BT + _sum_exp(logits_BTC, new_top_BT[..., None])
        return (new_top_BT, sum_BT), None

    start = jnp.full(targets_BT.shape, _VERY_NEGATIVE), jnp.zeros(targets_BT.shape)
    (top_BT, sum_BT), _ = lax.scan(add_chunk, start, jnp.arange(num_chunks))
    lse_BT = jnp.log(sum_BT) + top_BT
    nll_BT = lse_BT - _label_logits(low_BTD, weights_VD, targets_BT)
    losses = nll_BT, z_loss * jnp.square(lse_BT)
    return losses, (hidden_BTD, weights_VD, targets_BT, lse_BT)


def _loss_chunked_bwd(
    num_chunks: int, static: Static, residuals: tuple[jax.Array, ...], grads: Losses
) -> tuple[jax.Array, jax.Array, None]:
    _, operand, z_loss = static
    hidden_BTD, weights_VD, targets_BT, lse_BT = residuals
    low_BTD = hidden_BTD.astype(operand)
    weights_CND = _split(weights_VD, num_chunks)
    a, b = _coefficients(z_loss, grads, lse_BT)

    def add_chunk(dhidden_BTD: jax.Array, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights_CD, logits_BTC = _chunk_logits(static, low_BTD, weights_CND, chunk)
        error_BTC = a * jnp.exp(logits_BTC - lse_BT[..., None])
        error_BTC = error_BTC + (b - a) * _onehot(logits_BTC, targets_BT, chunk, num_chunks)
        error_BTC = error_BTC.astype(operand)
        dweights_CD = dot(error_BTC, low_BTD, (0, 1), (0, 1)).astype(weights_VD.dtype)
        return dhidden_BTD + dot(error_BTC, weights_CD, (2,), (0,)), dweights_CD

    start = jnp.zeros(hidden_BTD.shape, jnp.float32)
    dhidden_BTD, dweights_NCD = lax.scan(add_chunk, start, jnp.arange(num_chunks))
    dweights_CND = jnp.swapaxes(dweights_NCD, 0, 1)
    dweights_VD = dweights_CND.reshape(-1, weights_VD.shape[1])[: weights_VD.shape[0]]
    return dhidden_BTD.astype(hidden_BTD.dtype), dweights_VD, None


_loss_chunked.defvjp(_loss_chunked_fwd, _loss_chunked_bwd)
