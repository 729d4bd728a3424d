"""Attention with a gradient of its own for XLA:CPU: low-precision operands, few passes.

Every large product has its operands laid out as rows times columns, [T, S] @ [S, K] or
[K, T] @ [T, S]: transposing the small operand is cheap, transposing a [T, S] one is not. The
barriers keep XLA from fusing an exponential into a reduction, which it then computes one element
at a time, six times slower than in two loops.
"""

# Shape legend: B batch (1 in a mask that all rows share), T queries, S keys, H heads, K head dim.

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Causal sequences of at least _LONG tokens go in _BLOCKS blocks of queries, which skips 3/8 of the
# work: 8 % of a training step of 6 layers x 384 at 256 tokens.
_LONG = 128
_BLOCKS = 4

_BTHK_TO_BHTK = (0, 2, 1, 3)
_BTHK_TO_BHKT = (0, 2, 3, 1)
_BHKT_TO_BTHK = (0, 3, 1, 2)


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BTS: jax.Array | None,
    keep_BHTS: jax.Array | None,
    bias_HTS: jax.Array | None,
    keep_scale: float,
    operand: jnp.dtype,
    *,
    triangular: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias) v in fp32 with operands of dtype `operand`.

    Probabilities where `keep_BHTS` is false are dropped, the others multiplied by `keep_scale`.
    `triangular` promises that the mask, of as many queries as keys, hides all keys j > i: long
    sequences then go in blocks of queries, each with no keys after its own.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q_BTHK, k_BSHK, v_BSHK))
    T = q.shape[1]
    if not triangular or mask_BTS is None or T < _LONG or T % _BLOCKS:
        return _attention(keep_scale, operand, q, k, v, mask_BTS, keep_BHTS, bias_HTS)
    outs = []
    for start in range(0, T, T // _BLOCKS):
        end = start + T // _BLOCKS
        keep = None if keep_BHTS is None else keep_BHTS[:, :, start:end, :end]
        mask = mask_BTS[:, start:end, :end]
        bias = None if bias_HTS is None else bias_HTS[:, start:end, :end]
        block = q[:, start:end], k[:, :end], v[:, :end], mask, keep, bias
        outs.append(_attention(keep_scale, operand, *block))
    return jnp.concatenate(outs, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    keep_scale: float,
    operand: jnp.dtype,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BTS: jax.Array | None,
    keep_BHTS: jax.Array | None,
    bias_HTS: jax.Array | None,
) -> jax.Array:
    given = q_BTHK, k_BSHK, v_BSHK, mask_BTS, keep_BHTS, bias_HTS
    return _forward(keep_scale, operand, *given)[0]


def _forward(
    keep_scale: float,
    operand: jnp.dtype,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BTS: jax.Array | None,
    keep_BHTS: jax.Array | None,
    bias_HTS: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    q_BHTK = _lay_out(q_BTHK * (q_BTHK.shape[-1] ** -0.5), _BTHK_TO_BHTK, operand)
    k_BHKS = _lay_out(k_BSHK, _BTHK_TO_BHKT, operand)
    v_BHSK = _lay_out(v_BSHK, _BTHK_TO_BHTK, operand)
    scores_BHTS = _product(q_BHTK, k_BHKS)
    if bias_HTS is not None:
        scores_BHTS += bias_HTS[None]
    if mask_BTS is not None:
        scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS, -jnp.inf)
    top_BHT1 = jnp.max(scores_BHTS, axis=-1, keepdims=True)
    if mask_BTS is not None:  # of a query that sees no key the maximum is -inf
        top_BHT1 = jnp.where(top_BHT1 > -jnp.inf, top_BHT1, 0.0)
    weights_BHTS = jnp.exp(scores_BHTS - lax.optimization_barrier(top_BHT1)).astype(operand)
    weights_BHTS = lax.optimization_barrier(weights_BHTS)
    total_BHT1 = jnp.sum(weights_BHTS.astype(jnp.float32), axis=-1, keepdims=True)
    if mask_BTS is not None:
        total_BHT1 = jnp.where(total_BHT1 > 0, total_BHT1, 1.0)
    if keep_BHTS is not None:  # the sign says what was dropped, so that one array is kept
        weights_BHTS = jnp.where(keep_BHTS, weights_BHTS, -weights_BHTS)
    kept_BHTS = _kept(weights_BHTS, keep_scale)
    out_BHTK = _product(kept_BHTS, v_BHSK) / total_BHT1
    biased = None if bias_HTS is None else ()  # whether there is a bias, in the tree's structure
    residuals = (q_BHTK, k_BHKS, v_BHSK, weights_BHTS, total_BHT1, out_BHTK.astype(operand), biased)
    return jnp.transpose(out_BHTK, _BTHK_TO_BHTK), residuals


def _kept(weights_BHTS: jax.Array, keep_scale: float) -> jax.Array:
    """Unnormalised probabilities after dropout, from weights whose sign tells the dropped."""
    if keep_scale == 1.0:
        return weights_BHTS
    weights = weights_BHTS.astype(jnp.float32)
    return (jnp.maximum(weights, 0.0) * keep_scale).astype(weights_BHTS.dtype)


def _attention_fwd(
    keep_scale: float, operand: jnp.dtype, *args: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _forward(keep_scale, operand, *args)


def _attention_bwd(
    keep_scale: float, operand: jnp.dtype, residuals: tuple[Any, ...], dout_BTHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, jax.Array | None]:
    q_BHTK, k_BHKS, v_BHSK, weights_BHTS, total_BHT1, out_BHTK, biased = residuals
    dropping = keep_scale != 1.0
    # Dividing the small dout by the softmax's total leaves nothing to normalise in [T, S].
    dout_BHTK = jnp.transpose(dout_BTHK, _BTHK_TO_BHTK) / total_BHT1
    along_BHT1 = jnp.sum(dout_BHTK * out_BHTK.astype(jnp.float32), axis=-1, keepdims=True)
    dout_BHTK = lax.optimization_barrier(dout_BHTK.astype(operand))
    kept_BHTS = _kept(weights_BHTS, keep_scale)
    dv_BHKS = _product(jnp.swapaxes(dout_BHTK, 2, 3), kept_BHTS)
    dprobs_BHTS = _product(dout_BHTK, jnp.swapaxes(v_BHSK, 2, 3))
    weights = weights_BHTS.astype(jnp.float32)
    if dropping:
        dprobs_BHTS = jnp.where(weights > 0, dprobs_BHTS * keep_scale, 0.0)
        weights = jnp.abs(weights)
    dscores_BHTS = lax.optimization_barrier((weights * (dprobs_BHTS - along_BHT1)).astype(operand))
    dbias_HTS = None if biased is None else jnp.sum(dscores_BHTS.astype(jnp.float32), axis=0)
    dq_BHTK = _product(dscores_BHTS, jnp.swapaxes(k_BHKS, 2, 3))
    dk_BHKS = _product(jnp.swapaxes(q_BHTK, 2, 3), dscores_BHTS)
    dq_BTHK = jnp.transpose(dq_BHTK, _BTHK_TO_BHTK) * (q_BHTK.shape[-1] ** -0.5)
    dk_BSHK = jnp.transpose(dk_BHKS, _BHKT_TO_BTHK)
    dv_BSHK = jnp.transpose(dv_BHKS, _BHKT_TO_BTHK)
    return dq_BTHK, dk_BSHK, dv_BSHK, None, None, dbias_HTS


_attention.defvjp(_attention_fwd, _attention_bwd)


def _lay_out(x: jax.Array, order: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return lax.optimization_barrier(jnp.transpose(x, order).astype(dtype))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows times columns of the last two axes, summed in fp32."""
    numbers = (((3,), (2,)), ((0, 1), (0, 1)))
    return lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)
