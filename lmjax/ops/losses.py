"""Cross-entropy of a language model, from hidden states so that logits need never be held whole."""

# Shape legend: B batch, T length, D embed, V vocabulary with padding, C one of N vocabulary chunks.

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.core import Unembedding
from lmjax.ops.matmul import contract, dot, travelling_dtype
from lmjax.ops.spread import complete

# A maximum to start from and to fall back to: -inf would give NaN, as -inf - -inf.
_VERY_NEGATIVE = -1e30


def logits(hidden_BTD: jax.Array, unembedding: Unembedding) -> jax.Array:
    """Scores of every token, logits_BTV in fp32, biased, capped; columns of padding are -inf."""
    logits_BTV = contract(
        hidden_BTD,
        unembedding.weights_VD,
        dtype=unembedding.dtype,
        axes=((hidden_BTD.ndim - 1,), (1,)),
        result="float32",
    )
    static = _Static(
        unembedding.vocab_size, jnp.dtype(unembedding.dtype), softcap=unembedding.softcap
    )
    return _mask_padding(static, _cap(static, _biased(logits_BTV, unembedding.bias_V)), 0, 1)


def cross_entropy(
    hidden_BTD: jax.Array,
    unembedding: Unembedding,
    targets_BT: jax.Array,
    *,
    vocab_chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target in nats, and what is descended beside it, both fp32.

    Source: of (nll_BT, extra_BT) the second is z_loss * logsumexp(logits)^2 of PaLM,
    arXiv:2204.02311, section 5, plus label_smoothing * (the target's logit - the mean logit): the
    sum of both is then the cross-entropy with (1 - e) of the target and e of all tokens alike,
    Szegedy et al., arXiv:1512.00567, section 7. With `vocab_chunk` > 0 about that many logits a
    token are held, forward or backward, at the cost of one more product; the online logsumexp is
    Milakov & Gimelshein, arXiv:1805.02867.
    """
    if vocab_chunk < 0:
        raise ValueError(f"vocab_chunk is {vocab_chunk}; it must be 0 (no chunks) or positive")
    columns = sharding.split_axes("vocab")
    whole_D = sharding.split_axes("embed")
    across_T = sharding.split_over_length(hidden_BTD.shape[1])
    num_rows = unembedding.weights_VD.shape[0] // math.prod(map(sharding.axis_size, columns))
    num_chunks = -(-num_rows // vocab_chunk) if vocab_chunk else 1
    loss = _loss_whole if num_chunks == 1 else partial(_loss_chunked, num_chunks)
    operand = jnp.dtype(unembedding.dtype)
    static = _Static(
        unembedding.vocab_size,
        operand,
        z_loss,
        tuple(columns),
        unembedding.softcap,
        label_smoothing,
    )

    def local(
        hidden_BTD: jax.Array,
        weights_VD: jax.Array,
        targets_BT: jax.Array,
        bias_V: jax.Array | None = None,
    ) -> Losses:
        if across_T:
            hidden_BTD = lax.all_gather(hidden_BTD, tuple(across_T), axis=1, tiled=True)
        if whole_D:
            weights_VD = complete(weights_VD, "embed", 1, dtype=travelling_dtype(operand))
        return loss(static, hidden_BTD, weights_VD, bias_V, targets_BT)

    tokens = ("batch", "length")
    given = [
        (hidden_BTD, ("batch", "residual" if across_T else "length", None)),
        (unembedding.weights_VD, ("vocab", "embed")),
        (targets_BT, tokens),
    ]
    if unembedding.bias_V is not None:
        given.append((unembedding.bias_V, ("vocab",)))
    arrays, names = zip(*given, strict=True)
    return sharding.per_device(local, names, (tokens, tokens))(*arrays)


class _Static(NamedTuple):
    """What is known at compile time.

    Args:
      vocab_size: tokens, padding left out.
      operand: dtype of the products' operands.
      z_loss: weight of the z-loss.
      axes: mesh axes over which the vocabulary is split; each device has its own rows of the
        weights, and what they say of a token is summed over the devices.
      softcap: bound of the logits, if they have one.
      smoothing: of the labels.
    """

    vocab_size: int
    operand: jnp.dtype
    z_loss: float = 0.0
    axes: tuple[str, ...] = ()
    softcap: float | None = None
    smoothing: float = 0.0

    def sum(self, x: Any) -> Any:
        """The sum over all parts of the vocabulary."""
        return lax.psum(x, self.axes) if self.axes else x

    def max(self, x: jax.Array) -> jax.Array:
        """The maximum over all parts of the vocabulary."""
        return lax.pmax(lax.stop_gradient(x), self.axes) if self.axes else x

    def first(self, num_rows: int) -> Any:
        """The token of this device's first row."""
        return lax.axis_index(self.axes) * num_rows if self.axes else 0


Losses = tuple[jax.Array, jax.Array]


def _mask_padding(static: _Static, logits_BTC: jax.Array, chunk: Any, num_chunks: int) -> jax.Array:
    if num_chunks == 1 and not static.axes and logits_BTC.shape[-1] == static.vocab_size:
        return logits_BTC
    ids = _ids(static, logits_BTC, chunk, num_chunks)
    return jnp.where(ids < static.vocab_size, logits_BTC, -jnp.inf)


def _biased(logits_BTC: jax.Array, bias_C: jax.Array | None) -> jax.Array:
    if bias_C is None:
        return logits_BTC
    return logits_BTC + bias_C.astype(jnp.float32)[(None,) * (logits_BTC.ndim - 1)]


def _cap(static: _Static, logits: jax.Array) -> jax.Array:
    """c tanh(x / c); Bello et al., arXiv:1611.09940, as in Gemma 2, arXiv:2408.00118, section 2."""
    if static.softcap is None:
        return logits
    return static.softcap * jnp.tanh(logits / static.softcap)


def _cap_slope(static: _Static, capped: jax.Array) -> jax.Array | None:
    """The derivative of `_cap`, from what it gave; None for a constant 1."""
    return None if static.softcap is None else 1 - jnp.square(capped / static.softcap)


def _sum_exp(logits_BTC: jax.Array, top_BT1: jax.Array) -> jax.Array:
    # Two loops: XLA:CPU computes an exponential inside a reduction one element at a time.
    weights_BTC = lax.optimization_barrier(jnp.exp(logits_BTC - top_BT1))
    return jnp.sum(weights_BTC, axis=-1)


def _ids(static: _Static, logits_BTC: jax.Array, chunk: Any, num_chunks: int) -> jax.Array:
    """Token ids of the columns of chunk `chunk`, which holds every num_chunks-th token."""
    column = lax.broadcasted_iota(jnp.int32, logits_BTC.shape, logits_BTC.ndim - 1)
    return column * num_chunks + chunk + static.first(logits_BTC.shape[-1] * num_chunks)


def _label_logits(
    static: _Static,
    hidden_BTD: jax.Array,
    weights_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
) -> jax.Array:
    """The target's logit from its own row, where this device has it; summed over the devices."""
    row_BT = targets_BT - static.first(weights_VD.shape[0])
    rows_BTD = jnp.take(weights_VD, row_BT, axis=0, mode="clip").astype(hidden_BTD.dtype)
    logits_BT = jnp.sum(hidden_BTD.astype(jnp.float32) * rows_BTD.astype(jnp.float32), axis=-1)
    if bias_V is not None:
        logits_BT += jnp.take(bias_V, row_BT, mode="clip").astype(jnp.float32)
    if static.axes:
        logits_BT = jnp.where((row_BT >= 0) & (row_BT < weights_VD.shape[0]), logits_BT, 0.0)
    return logits_BT


def _extra(
    static: _Static, lse_BT: jax.Array, label_BT: jax.Array, sum_BT: jax.Array | None
) -> jax.Array:
    """What is descended beside the nll; `sum_BT` is of the logits, of the whole vocabulary."""
    extra_BT = static.z_loss * jnp.square(lse_BT)
    if sum_BT is not None:
        extra_BT += static.smoothing * (label_BT - sum_BT / static.vocab_size)
    return extra_BT


def _sum_logits(static: _Static, logits_BTC: jax.Array) -> jax.Array | None:
    """Of masked logits, if they count; padding is left out."""
    if not static.smoothing:
        return None
    return jnp.sum(logits_BTC, axis=-1, where=jnp.isfinite(logits_BTC))


def _coefficients(static: _Static, grads: Losses, lse_BT: jax.Array) -> tuple[jax.Array, ...]:
    """(a, b, c) of the logits' gradient a (softmax - onehot) + b onehot - c, each [B, T, 1]."""
    nll_grad, grad = static.sum(grads)  # each device is given its share of the whole
    of_z, smooth = 2 * static.z_loss * lse_BT * grad, static.smoothing * grad
    return tuple(x[..., None] for x in (nll_grad + of_z, of_z + smooth, smooth / static.vocab_size))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_whole(static: _Static, *arrays: Any) -> Losses:
    return _forward_whole(static, *arrays)[-1]


def _forward_whole(
    static: _Static,
    hidden_BTD: jax.Array,
    weights_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None], jax.Array, Losses]:
    """(operands, (logits, slope of their cap), logsumexp, losses)."""
    hidden_BTD, weights_VD = (x.astype(static.operand) for x in (hidden_BTD, weights_VD))
    capped_BTV = _cap(static, _biased(dot(hidden_BTD, weights_VD, (2,), (1,)), bias_V))
    logits_BTV = _mask_padding(static, capped_BTV, 0, 1)
    top_BT1 = static.max(jnp.max(logits_BTV, axis=-1, keepdims=True))
    label_BT = _label_logits(static, hidden_BTD, weights_VD, bias_V, targets_BT)
    sums = _sum_exp(logits_BTV, top_BT1), label_BT, _sum_logits(static, logits_BTV)
    sum_BT, label_BT, all_BT = static.sum(sums)
    lse_BT, label_BT = jnp.log(sum_BT) + top_BT1[..., 0], _cap(static, label_BT)
    losses = lse_BT - label_BT, _extra(static, lse_BT, label_BT, all_BT)
    return (hidden_BTD, weights_VD), (logits_BTV, _cap_slope(static, capped_BTV)), lse_BT, losses


def _loss_whole_fwd(static: _Static, *arrays: Any) -> tuple[Losses, tuple[Any, ...]]:
    *given, targets_BT = arrays
    operands, (logits_BTV, slope_BTV), lse_BT, losses = _forward_whole(static, *arrays)
    # The gradient but for a factor per token, so that the backward is two products and no more.
    error_BTV = jnp.exp(logits_BTV - lse_BT[..., None])
    error_BTV = (error_BTV - _onehot(static, error_BTV, targets_BT, 0, 1)).astype(static.operand)
    if slope_BTV is not None:
        slope_BTV = slope_BTV.astype(static.operand)
    like = jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), given)
    return losses, (*operands, targets_BT, error_BTV, slope_BTV, lse_BT, like)


def _onehot(
    static: _Static, logits_BTC: jax.Array, targets_BT: jax.Array, chunk: Any, num_chunks: int
) -> jax.Array:
    ids = _ids(static, logits_BTC, chunk, num_chunks)
    return (ids == targets_BT[..., None].astype(jnp.int32)).astype(jnp.float32)


def _taken(
    static: _Static,
    like_BTC: jax.Array,
    targets_BT: jax.Array,
    chunk: Any,
    num: int,
    b: Any,
    c: Any,
) -> jax.Array:
    """b * onehot + c, the latter for tokens and not for padding."""
    found = b * _onehot(static, like_BTC, targets_BT, chunk, num)
    if not static.smoothing:
        return found
    return found + jnp.where(_ids(static, like_BTC, chunk, num) < static.vocab_size, c, 0.0)


def _loss_whole_bwd(
    static: _Static, residuals: tuple[Any, ...], grads: Losses
) -> tuple[jax.Array, jax.Array, jax.Array | None, None]:
    operand = static.operand
    hidden_BTD, weights_VD, targets_BT, error_BTV, slope_BTV, lse_BT, like = residuals
    like_hidden, like_weights, like_bias = like
    a, b, c = _coefficients(static, grads, lse_BT)
    if static.z_loss or static.smoothing:
        taken_BTV = _taken(static, error_BTV, targets_BT, 0, 1, -b, c)
        error_BTV = (a * error_BTV.astype(jnp.float32) - taken_BTV).astype(operand)
        a = jnp.ones_like(a)
    if slope_BTV is not None:
        error_BTV = error_BTV * slope_BTV
    dhidden_BTD = a * dot(error_BTV, weights_VD, (2,), (0,))
    scaled_BTD = (a * hidden_BTD.astype(jnp.float32)).astype(operand)
    dweights_VD = dot(error_BTV, scaled_BTD, (0, 1), (0, 1)).astype(like_weights.dtype)
    dbias_V = None
    if like_bias is not None:
        dbias_V = jnp.sum(a * error_BTV.astype(jnp.float32), (0, 1)).astype(like_bias.dtype)
    return dhidden_BTD.astype(like_hidden.dtype), dweights_VD, dbias_V, None


_loss_whole.defvjp(_loss_whole_fwd, _loss_whole_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_chunked(num_chunks: int, static: _Static, *arrays: Any) -> Losses:
    return _loss_chunked_fwd(num_chunks, static, *arrays)[0]


def _split(
    weights_VD: jax.Array, bias_V: jax.Array | None, num_chunks: int
) -> tuple[jax.Array, jax.Array | None]:
    """weights_CND, bias_CN: chunk n is every N-th token, so that a split V leaves C split alike."""
    V, D = weights_VD.shape
    weights_CND = jnp.pad(weights_VD, ((0, -V % num_chunks), (0, 0))).reshape(-1, num_chunks, D)
    if bias_V is None:
        return weights_CND, None
    return weights_CND, jnp.pad(bias_V, (0, -V % num_chunks)).reshape(-1, num_chunks)


def _chunk_logits(
    static: _Static,
    hidden_BTD: jax.Array,
    weights_CND: jax.Array,
    bias_CN: jax.Array | None,
    chunk: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(the chunk's weights, its logits, the slope of their cap)."""
    weights_CD = lax.dynamic_index_in_dim(weights_CND, chunk, axis=1, keepdims=False)
    weights_CD = weights_CD.astype(static.operand)
    logits_BTC = dot(hidden_BTD, weights_CD, (2,), (1,))
    if bias_CN is not None:
        logits_BTC = _biased(logits_BTC, lax.dynamic_index_in_dim(bias_CN, chunk, 1, False))
    capped_BTC = _cap(static, logits_BTC)
    logits_BTC = _mask_padding(static, capped_BTC, chunk, weights_CND.shape[1])
    return weights_CD, logits_BTC, _cap_slope(static, capped_BTC)


def _loss_chunked_fwd(
    num_chunks: int,
    static: _Static,
    hidden_BTD: jax.Array,
    weights_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
) -> tuple[Losses, tuple[Any, ...]]:
    low_BTD = hidden_BTD.astype(static.operand)
    weights_CND, bias_CN = _split(weights_VD, bias_V, num_chunks)

    def add_chunk(
        carry: tuple[jax.Array, jax.Array], chunk: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
        top_BT, sum_BT = carry
        _, logits_BTC, _ = _chunk_logits(static, low_BTD, weights_CND, bias_CN, chunk)
        new_top_BT = jnp.maximum(top_BT, jnp.max(logits_BTC, axis=-1))
        sum_BT = sum_BT * jnp.exp(top_BT - new_top_BT)
        sum_BT = sum_BT + _sum_exp(logits_BTC, new_top_BT[..., None])
        return (new_top_BT, sum_BT), _sum_logits(static, logits_BTC)

    start = jnp.full(targets_BT.shape, _VERY_NEGATIVE), jnp.zeros(targets_BT.shape)
    (top_BT, sum_BT), all_NBT = lax.scan(add_chunk, start, jnp.arange(num_chunks))
    all_top_BT = static.max(top_BT)
    label_BT = _label_logits(static, low_BTD, weights_VD, bias_V, targets_BT)
    all_BT = None if all_NBT is None else jnp.sum(all_NBT, axis=0)
    sums = sum_BT * jnp.exp(top_BT - all_top_BT), label_BT, all_BT
    sum_BT, label_BT, all_BT = static.sum(sums)
    lse_BT, label_BT = jnp.log(sum_BT) + all_top_BT, _cap(static, label_BT)
    losses = lse_BT - label_BT, _extra(static, lse_BT, label_BT, all_BT)
    return losses, (hidden_BTD, weights_VD, bias_V, targets_BT, lse_BT)


def _loss_chunked_bwd(
    num_chunks: int, static: _Static, residuals: tuple[Any, ...], grads: Losses
) -> tuple[jax.Array, jax.Array, jax.Array | None, None]:
    hidden_BTD, weights_VD, bias_V, targets_BT, lse_BT = residuals
    low_BTD = hidden_BTD.astype(static.operand)
    weights_CND, bias_CN = _split(weights_VD, bias_V, num_chunks)
    a, b, c = _coefficients(static, grads, lse_BT)

    def add_chunk(
        dhidden_BTD: jax.Array, chunk: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
        weights_CD, logits_BTC, slope_BTC = _chunk_logits(
            static, low_BTD, weights_CND, bias_CN, chunk
        )
        taken_BTC = _taken(static, logits_BTC, targets_BT, chunk, num_chunks, a - b, c)
        error_BTC = a * jnp.exp(logits_BTC - lse_BT[..., None]) - taken_BTC
        if slope_BTC is not None:
            error_BTC = error_BTC * slope_BTC
        dbias_C = None if bias_CN is None else jnp.sum(error_BTC, (0, 1))
        error_BTC = error_BTC.astype(static.operand)
        dweights_CD = dot(error_BTC, low_BTD, (0, 1), (0, 1)).astype(weights_VD.dtype)
        dhidden_BTD += dot(error_BTC, weights_CD, (2,), (0,))
        return dhidden_BTD, (dweights_CD, dbias_C)

    start = jnp.zeros(hidden_BTD.shape, jnp.float32)
    dhidden_BTD, (dweights_NCD, dbias_NC) = lax.scan(add_chunk, start, jnp.arange(num_chunks))
    dweights_CND = jnp.swapaxes(dweights_NCD, 0, 1)
    dweights_VD = dweights_CND.reshape(-1, weights_VD.shape[1])[: weights_VD.shape[0]]
    dbias_V = None
    if bias_V is not None and dbias_NC is not None:
        dbias_V = dbias_NC.T.reshape(-1)[: len(bias_V)].astype(bias_V.dtype)
    return dhidden_BTD.astype(hidden_BTD.dtype), dweights_VD, dbias_V, None


_loss_chunked.defvjp(_loss_chunked_fwd, _loss_chunked_bwd)
