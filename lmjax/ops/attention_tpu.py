"""Flash attention for TPUs: the splash kernel, on each device's rows and heads.

A Pallas kernel is opaque to the partitioner, so it runs inside `sharding.per_device`. Scores never
leave the chip's vector memory; blocks that a causal mask or a window hides are not visited.
"""

# Shape legend: B batch, T length, H heads, G key-value heads, K head dim.

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.ops.attention_ring import Segments

# The kernel's blocks are whole lanes; the largest that divides the padded length is taken.
_LANES = 128
_BLOCKS = (512, 256, 128)

_QUERIES = ("batch", "length", "act_heads", None)
_KEYS = ("batch", "length", "act_kv_heads", None)
_ROWS = ("batch", "length")


def attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    causal: bool,
    segments: Segments = (),
    window: int | None = None,
    softcap: float | None = None,
    operand: jnp.dtype,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + mask) v, as out_BTHK in `operand`.

    Source: Dao, arXiv:2307.08691, by the kernel `splash_attention` of jax.experimental.pallas.
    Departures from plain attention: the scale multiplies q before it is rounded to `operand`, and a
    query that sees no key gets a mean of values, which the caller has to set to zero.

    Args:
      segments: (of the queries, of the keys), int [B, T] each, above the smallest int32; a query
        sees keys of its own only.
      window: so many keys a query sees at most, itself the last; with a causal mask.
      softcap: bound of the scores, by softcap * tanh(score / softcap).
      interpret: computes the kernel's steps with plain operations, for tests on other platforms.
    """
    local = partial(_attention, causal, window, softcap, operand, interpret)
    inputs = (_QUERIES, _KEYS, _KEYS, _ROWS)
    return sharding.per_device(local, inputs, _QUERIES)(q_BTHK, k_BTGK, v_BTGK, segments)


def fits(length: int) -> bool:
    """Whether sequences are long enough for the kernel's blocks."""
    return length >= _LANES


def _attention(
    causal: bool,
    window: int | None,
    softcap: float | None,
    operand: jnp.dtype,
    interpret: bool,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments: Segments,
) -> jax.Array:
    # Only what runs on a TPU should spend the time that this import takes.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, H, K = q_BTHK.shape
    padding = -T % _LANES
    if padding:
        # Real queries see no padding: it lies after them, or in a segment of its own.
        if not causal and not segments:
            segments = (jnp.zeros((B, T), jnp.int32),) * 2
        q_BTHK, k_BTGK, v_BTGK = (
            jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTHK, k_BTGK, v_BTGK)
        )
        none = jnp.iinfo(jnp.int32).min
        of_queries, of_keys = (
            jnp.pad(x, ((0, 0), (0, padding)), constant_values=none) for x in segments
        )
        segments = of_queries, of_keys
    size = T + padding
    block = next(b for b in _BLOCKS if size % b == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    one: Any = splash.CausalMask((size, size)) if causal else splash.FullMask((size, size))
    if window is not None:
        one = splash.LocalMask((size, size), window_size=(window - 1, 0), offset=0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([one] * H),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    q = (q_BTHK.astype(jnp.float32) * K**-0.5).astype(operand)
    q, k, v = (jnp.swapaxes(x.astype(operand), 1, 2) for x in (q, k_BTGK, v_BTGK))
    ids = splash.SegmentIds(*segments) if segments else None
    out_BHTK = jax.vmap(kernel)(q, k, v, ids)
    return lax.slice_in_dim(jnp.swapaxes(out_BHTK, 1, 2), 0, T, axis=1)
