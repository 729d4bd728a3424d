"""Scaled dot-product attention with grouped key-value heads: one function for every use."""

# Shape legend: B batch (1 in a mask that all rows share), T queries, S keys, H heads,
# G key-value heads, R = H / G, K head dim.

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from lmjax import sharding
from lmjax.ops import attention_cpu
from lmjax.ops.dropout import dropout_mask
from lmjax.ops.matmul import activation_dtype


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    causal: bool,
    segments_q_BT: jax.Array | None = None,
    segments_kv_BS: jax.Array | None = None,
    q_offset: jax.Array | int = 0,
    kv_length: jax.Array | int | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    dtype: str = "float32",
    implementation: Literal["auto", "xla", "cudnn"] = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + mask) v, as out_BTHK; a query that sees no key gets zeros.

    Source: Vaswani et al., arXiv:1706.03762, equation 1; grouped heads: Ainslie et al.,
    arXiv:2305.13245. Dropout falls on the probabilities.

    Args:
      causal: query i sees keys j <= q_offset + i only.
      q_offset: index among the keys of the first query, a scalar or one per row; in decoding, how
        many tokens the cache held before these. Slots after the last query are thus unseen.
      segments_q_BT, segments_kv_BS: a query sees keys of its own segment only; give both.
      kv_length: how many of the keys are filled, a scalar or one per row.
      implementation: "auto" takes cuDNN's flash attention on a GPU where it applies (bf16 or
        fp16, no dropout, no offset), our own gradient on a CPU, and else plain XLA.
    """
    if (segments_q_BT is None) != (segments_kv_BS is None):
        raise ValueError("segments of queries and of keys go together: give both or neither")
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    if H % G:
        raise ValueError(f"{H} query heads are no multiple of {G} key-value heads")
    out_dtype = activation_dtype(dtype)
    aligned = isinstance(q_offset, int) and q_offset == 0
    if implementation == "auto":
        fits = aligned and dtype in ("bfloat16", "float16") and not dropout_rate
        fits = fits and q_BTHK.shape[-1] % 8 == 0 and q_BTHK.shape[1] > 1
        implementation = "cudnn" if fits and sharding.platform() == "gpu" else "xla"
    q, k, v = q_BTHK, k_BSGK, v_BSGK
    if implementation == "cudnn":
        if dropout_rate or not aligned:
            raise ValueError("cuDNN attention knows neither dropout nor q_offset: use 'auto'")
        mask_BTS = _mask(q, k, False, segments_q_BT, segments_kv_BS, 0, kv_length)
        out_BTHK = jax.nn.dot_product_attention(
            q.astype(dtype),
            k.astype(dtype),
            v.astype(dtype),
            mask=None if mask_BTS is None else mask_BTS[:, None],
            is_causal=causal,
            implementation="cudnn",
        )
        return _zero_unseeing(out_BTHK, mask_BTS, causal).astype(out_dtype)
    if implementation != "xla":
        raise ValueError(f"implementation is {implementation!r}: 'auto', 'xla' or 'cudnn'")
    mask_BTS = _mask(q, k, causal, segments_q_BT, segments_kv_BS, q_offset, kv_length)
    keep_BHTS, keep_scale = None, 1.0
    if dropout_rate:
        shape = (q.shape[0], H, q.shape[1], k.shape[1])
        keep_BHTS, keep_scale = dropout_mask(dropout_rng, shape, dropout_rate)
    if sharding.platform() == "cpu" and q.shape[1] > 1:
        k, v = (jnp.repeat(a, H // G, axis=2) if H > G else a for a in (k, v))
        triangular = causal and aligned and q.shape[1] == k.shape[1]
        operand = jnp.dtype(dtype)
        return attention_cpu.attention(
            q, k, v, mask_BTS, keep_BHTS, keep_scale, operand, triangular=triangular
        )
    return _attention_xla(q, k, v, mask_BTS, keep_BHTS, keep_scale, jnp.dtype(dtype)).astype(
        out_dtype
    )


def _mask(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    causal: bool,
    segments_q_BT: jax.Array | None,
    segments_kv_BS: jax.Array | None,
    q_offset: jax.Array | int,
    kv_length: jax.Array | int | None,
) -> jax.Array | None:
    """Which keys each query sees, mask_BTS; None for all."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    key_11S = jnp.arange(S, dtype=jnp.int32)[None, None, :]
    terms = []
    if causal:
        offset_B11 = jnp.asarray(q_offset, jnp.int32).reshape(-1, 1, 1)
        terms.append(key_11S <= offset_B11 + jnp.arange(T, dtype=jnp.int32)[None, :, None])
    if kv_length is not None:
        filled_B1S = key_11S < jnp.asarray(kv_length, jnp.int32).reshape(-1, 1, 1)
        terms.append(jnp.broadcast_to(filled_B1S, (filled_B1S.shape[0], T, S)))
    if segments_q_BT is not None and segments_kv_BS is not None:
        terms.append(segments_q_BT[:, :, None] == segments_kv_BS[:, None, :])
    if not terms:
        return None
    mask_BTS = terms[0]
    for term in terms[1:]:
        mask_BTS = mask_BTS & term
    return mask_BTS


def _zero_unseeing(out_BTHK: jax.Array, mask_BTS: jax.Array | None, causal: bool) -> jax.Array:
    """Zeros where a query sees no key; jax.nn spreads such a query evenly over all keys."""
    if mask_BTS is None:
        return out_BTHK
    if causal:
        _, T, S = mask_BTS.shape
        mask_BTS = mask_BTS & jnp.tri(T, S, dtype=bool)[None]
    seeing_BT = jnp.broadcast_to(jnp.any(mask_BTS, axis=-1), out_BTHK.shape[:2])
    return jnp.where(seeing_BT[:, :, None, None], out_BTHK, jnp.zeros_like(out_BTHK))


def _attention_xla(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array | None,
    keep_BHTS: jax.Array | None,
    keep_scale: float,
    operand: jnp.dtype,
) -> jax.Array:
    """Plain products, differentiated by jax; grouped heads share keys without copies."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K).astype(operand)
    scores_BGRTS = jnp.einsum(
        "BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK.astype(operand), preferred_element_type=jnp.float32
    ) * (K**-0.5)
    if mask_BTS is not None:
        scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, -jnp.inf)
    # A query that sees no key has top = -inf: zero keeps exp(-inf - top) at zero rather than NaN.
    top = jax.lax.stop_gradient(jnp.max(scores_BGRTS, axis=-1, keepdims=True))
    weights = jnp.exp(scores_BGRTS - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probs_BGRTS = weights / jnp.where(total > 0, total, 1.0)
    if keep_BHTS is not None:
        keep_BGRTS = keep_BHTS.reshape(B, G, H // G, T, S)
        probs_BGRTS = jnp.where(keep_BGRTS, probs_BGRTS * keep_scale, 0.0)
    out_BTGRK = jnp.einsum(
        "BGRTS,BSGK->BTGRK",
        probs_BGRTS.astype(operand),
        v_BSGK.astype(operand),
        preferred_element_type=jnp.float32,
    )
    return out_BTGRK.reshape(B, T, H, K)
