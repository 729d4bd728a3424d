"""Scaled dot-product attention with grouped key-value heads: one function for every use."""

# Shape legend: B batch (1 in a mask that all rows share), T queries, S keys, H heads,
# G key-value heads, R = H / G, K head dim.

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmjax import sharding
from lmjax.errors import UserError
from lmjax.ops import attention_cpu, attention_ring, attention_tpu
from lmjax.ops.attention_ring import Segments
from lmjax.ops.dropout import dropout_mask
from lmjax.ops.matmul import activation_dtype

Names = tuple[str | None, ...]
Implementation = Literal["auto", "xla", "cudnn", "splash", "ring"]


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
    window: int | None = None,
    windowed: jax.Array | None = None,
    softcap: float | None = None,
    bias_HTS: jax.Array | None = None,
    prefix: tuple[jax.Array, jax.Array] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    dtype: str = "float32",
    implementation: Implementation = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias + mask) v, as out_BTHK; a query that sees no key gets zeros.

    Source: Vaswani et al., arXiv:1706.03762, equation 1; grouped heads: Ainslie et al.,
    arXiv:2305.13245; windows: Mistral, arXiv:2310.06825, section 2; soft-caps: Gemma 2,
    arXiv:2408.00118, section 2. Dropout falls on the probabilities.

    Args:
      causal: query i sees keys j <= q_offset + i only.
      window: it sees keys j > q_offset + i - window only; needs `causal`.
      windowed: a bool on the device, for layers in a loop: whether the window holds.
      softcap: scores s become softcap * tanh(s / softcap) before the softmax.
      bias_HTS: float32, is added to all rows' scores, after the soft-cap.
      prefix: further keys and values, [P, G, K] each, that all queries of all rows see, whatever
        their positions and segments; without bias.
      q_offset: index among the keys of the first query, a scalar or one per row; in decoding, how
        many tokens the cache held before these. Slots after the last query are thus unseen.
      segments_q_BT, segments_kv_BS: a query sees keys of its own segment only; give both. The
        smallest int32 is no segment: kernels need it for keys that are not filled.
      kv_length: how many of the keys are filled, a scalar or one per row.
      implementation: "auto" takes, for queries and keys of the same positions and no bias, the ring
        over the mesh axis `context` where it has more than one device, the splash kernel on a TPU
        (no dropout, 128 tokens or more) and cuDNN's flash attention on a GPU (bf16 or fp16, no
        dropout or soft-cap); else our own gradient on a CPU (no soft-cap), and plain XLA elsewhere.

    Raises:
      UserError: for dropout where `context` splits the sequence (its mask must not depend on the
        layout, and no device of the ring could draw its part alone), and for a length that
        `context` does not divide.
    """
    if (segments_q_BT is None) != (segments_kv_BS is None):
        raise ValueError("segments of queries and of keys go together: give both or neither")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window of {window} tokens, causal={causal}: want at least 1, and True")
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    if H % G:
        raise ValueError(f"{H} query heads are no multiple of {G} key-value heads")
    out_dtype, operand = activation_dtype(dtype), jnp.dtype(dtype)
    aligned = isinstance(q_offset, int) and q_offset == 0
    if implementation == "auto":
        plain = aligned and bias_HTS is None and prefix is None
        implementation = _choose(q_BTHK, k_BSGK, plain, dropout_rate, softcap, dtype)
    q, k, v = q_BTHK, k_BSGK, v_BSGK
    if implementation in ("cudnn", "splash", "ring"):
        if bias_HTS is not None or prefix is not None:
            raise ValueError(f"{implementation} attention knows no bias and no prefix: use 'auto'")
        _check_kernel(implementation, q, k, aligned, dropout_rate, softcap)
        segments = _segments(q, k, segments_q_BT, segments_kv_BS, kv_length)
        if implementation == "ring":
            return attention_ring.attention(
                q,
                k,
                v,
                causal=causal,
                segments=segments,
                window=window,
                windowed=windowed,
                softcap=softcap,
                operand=operand,
                out_dtype=out_dtype,
            )
        options: dict[str, Any] = {"causal": causal, "segments": segments, "operand": operand}
        if implementation == "splash":
            options["softcap"] = softcap
        flash = _attention_cudnn if implementation == "cudnn" else attention_tpu.attention
        if window is None or windowed is None:
            out_BTHK = flash(q, k, v, window=window, **options)
        else:  # a kernel's window is known when it is compiled
            out_BTHK = jax.lax.cond(
                windowed,
                lambda q, k, v: flash(q, k, v, window=window, **options),
                lambda q, k, v: flash(q, k, v, window=None, **options),
                *(q, k, v),
            )
        out_BTHK = _zero_unseeing(out_BTHK, k, segments, causal, window, windowed)
        return out_BTHK.astype(out_dtype)
    if implementation != "xla":
        raise ValueError(
            f"implementation is {implementation!r}: 'auto', 'xla', 'cudnn', 'splash' or 'ring'"
        )
    segments = ()
    if segments_q_BT is not None and segments_kv_BS is not None:
        segments = segments_q_BT, segments_kv_BS
    mask_BTS = _mask(q, k, causal, segments, q_offset, kv_length, window, windowed)
    if prefix is not None:
        first = ((0, 0), (0, 0), (prefix[0].shape[0], 0))
        mask_BTS = None if mask_BTS is None else jnp.pad(mask_BTS, first, constant_values=True)
        bias_HTS = None if bias_HTS is None else jnp.pad(bias_HTS, first)
        k, v = (_after(one_PGK, x) for one_PGK, x in zip(prefix, (k, v), strict=True))
        aligned = False
    keep_BHTS, keep_scale = None, 1.0
    if dropout_rate:
        shape = (q.shape[0], H, q.shape[1], k.shape[1])
        keep_BHTS, keep_scale = dropout_mask(dropout_rng, shape, dropout_rate)
    on_cpu = sharding.platform() == "cpu" and q.shape[1] > 1 and softcap is None
    if sharding.platform() == "cpu" and q.shape[1] == 1:
        operand = jnp.dtype("float32")  # of few rows a product in bf16 is far slower (ops.matmul)
    triangular = causal and aligned and q.shape[1] == k.shape[1]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *given: jax.Array) -> jax.Array:
        rest = iter(given)
        mask = None if mask_BTS is None else next(rest)
        keep = None if keep_BHTS is None else next(rest)
        bias = None if bias_HTS is None else next(rest)
        if not on_cpu:
            out = _attention_xla(q, k, v, mask, keep, bias, keep_scale, softcap, operand)
            return out.astype(out_dtype)
        k, v = (jnp.repeat(x, H // G, axis=2) if H > G else x for x in (k, v))
        return attention_cpu.attention(
            q, k, v, mask, keep, bias, keep_scale, operand, triangular=triangular
        )

    arrays: list[tuple[jax.Array, Names]] = [(q, _QUERIES), (k, _KEYS), (v, _KEYS)]
    if mask_BTS is not None:
        arrays.append((mask_BTS, (None if mask_BTS.shape[0] == 1 else "batch", None, None)))
    if keep_BHTS is not None:
        arrays.append((keep_BHTS, ("batch", "act_heads", None, None)))
    if bias_HTS is not None:
        arrays.append((bias_HTS, ("act_heads", None, None)))
    given, names = zip(*arrays, strict=True)
    if sharding.axis_size("context") == 1 and _divides(q, k):
        return sharding.per_device(local, names, _QUERIES)(*given)
    return local(*given)


def _after(prefix_PGK: jax.Array, x_BSGK: jax.Array) -> jax.Array:
    """Keys or values behind those of a prefix, which is the same for all rows."""
    shape = (x_BSGK.shape[0], *prefix_PGK.shape)
    rows_BPGK = jnp.broadcast_to(prefix_PGK.astype(x_BSGK.dtype)[None], shape)
    return jnp.concatenate([rows_BPGK, x_BSGK], axis=1)


# Rows and heads are independent: each device has its own, and all of the sequence.
_QUERIES: Names = ("batch", None, "act_heads", None)
_KEYS: Names = ("batch", None, "act_kv_heads", None)


def _divides(q_BTHK: jax.Array, k_BSGK: jax.Array) -> bool:
    """Whether all devices of the mesh in use have equally many rows and heads."""
    B, _, H, _ = q_BTHK.shape
    parts = ((B, "batch"), (H, "act_heads"), (k_BSGK.shape[2], "act_kv_heads"))
    return not any(size % sharding.ways(name) for size, name in parts)


def _choose(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    plain: bool,
    dropout_rate: float,
    softcap: float | None,
    dtype: str,
) -> Implementation:
    """What "auto" means for these arguments on the mesh in use.

    `plain`: queries and keys have the same positions, and scores no bias.
    """
    T, S, K = q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.shape[-1]
    if not plain or T == 1:
        return "xla"
    if sharding.axis_size("context") > 1:
        return "ring" if T == S else "xla"
    if dropout_rate or not _divides(q_BTHK, k_BSGK):
        return "xla"
    platform = sharding.platform()
    if platform == "gpu" and dtype in ("bfloat16", "float16") and K % 8 == 0 and softcap is None:
        return "cudnn"
    if platform == "tpu" and dtype in ("bfloat16", "float32") and T == S and attention_tpu.fits(T):
        return "splash"
    return "xla"


def _check_kernel(
    name: str,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    aligned: bool,
    dropout_rate: float,
    softcap: float | None,
) -> None:
    """Raises where what was asked for is not what a kernel computes."""
    context = sharding.axis_size("context")
    if name == "ring" and dropout_rate:
        raise UserError(
            f"dropout of {dropout_rate} on attention probabilities needs context=1, and the mesh "
            f"has context={context}: set the attention's dropout to 0, or context=1."
        )
    if dropout_rate or not aligned:
        raise ValueError(f"{name} attention knows neither dropout nor q_offset: use 'auto'")
    if name == "cudnn" and softcap is not None:
        raise ValueError("cudnn attention knows no softcap: use 'auto'")
    if name != "cudnn" and q_BTHK.shape[1] != k_BSGK.shape[1]:
        raise ValueError(f"{name} attention wants as many queries as keys: use 'auto'")
    if (name == "ring") != (context > 1):
        raise ValueError(f"{name} attention is not for a mesh with context={context}: use 'auto'")


def _segments(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    segments_q_BT: jax.Array | None,
    segments_kv_BS: jax.Array | None,
    kv_length: jax.Array | int | None,
) -> Segments:
    """Segments of queries and of keys, unfilled keys in one that no query has; () for no mask."""
    if segments_q_BT is None or segments_kv_BS is None:
        if kv_length is None:
            return ()
        segments_q_BT = jnp.zeros(q_BTHK.shape[:2], jnp.int32)
        segments_kv_BS = jnp.zeros(k_BSGK.shape[:2], jnp.int32)
    if kv_length is None:
        return segments_q_BT, segments_kv_BS
    key_1S = jnp.arange(k_BSGK.shape[1], dtype=jnp.int32)[None]
    filled_BS = key_1S < jnp.asarray(kv_length, jnp.int32).reshape(-1, 1)
    return segments_q_BT, jnp.where(filled_BS, segments_kv_BS, jnp.iinfo(jnp.int32).min)


def _attention_cudnn(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    causal: bool,
    segments: Segments,
    window: int | None,
    operand: jnp.dtype,
) -> jax.Array:
    """cuDNN's flash attention on each device's rows and heads, in dtype `operand`."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
        mask_B1TS, own_window = None, None if window is None else (window - 1, 0)
        if segments:  # a mask is made anyway, so it holds the window too
            mask_BTS = _mask(q, k, causal, segments, 0, None, window, None)
            assert mask_BTS is not None
            mask_B1TS, own_window = mask_BTS[:, None], None
        return jax.nn.dot_product_attention(
            q.astype(operand),
            k.astype(operand),
            v.astype(operand),
            mask=mask_B1TS,
            is_causal=causal,
            local_window_size=own_window,
            implementation="cudnn",
        )

    rows = ("batch", "length")
    queries, keys = (*rows, "act_heads", None), (*rows, "act_kv_heads", None)
    wrapped = sharding.per_device(local, (queries, keys, keys, rows), queries)
    return wrapped(q_BTHK, k_BSGK, v_BSGK, segments)


def _mask(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    causal: bool,
    segments: Segments,
    q_offset: jax.Array | int,
    kv_length: jax.Array | int | None,
    window: int | None,
    windowed: jax.Array | None,
) -> jax.Array | None:
    """Which keys each query sees, mask_BTS; None for all."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    key_11S = jnp.arange(S, dtype=jnp.int32)[None, None, :]
    terms = []
    if causal:
        offset_B11 = jnp.asarray(q_offset, jnp.int32).reshape(-1, 1, 1)
        query_BT1 = offset_B11 + jnp.arange(T, dtype=jnp.int32)[None, :, None]
        terms.append(key_11S <= query_BT1)
        if window is not None:
            near_BTS = query_BT1 - key_11S < window
            terms.append(near_BTS if windowed is None else near_BTS | ~windowed)
    if kv_length is not None:
        filled_B1S = key_11S < jnp.asarray(kv_length, jnp.int32).reshape(-1, 1, 1)
        terms.append(jnp.broadcast_to(filled_B1S, (filled_B1S.shape[0], T, S)))
    if segments:
        terms.append(segments[0][:, :, None] == segments[1][:, None, :])
    if not terms:
        return None
    mask_BTS = terms[0]
    for term in terms[1:]:
        mask_BTS = mask_BTS & term
    return mask_BTS


def _zero_unseeing(
    out_BTHK: jax.Array,
    k_BSGK: jax.Array,
    segments: Segments,
    causal: bool,
    window: int | None,
    windowed: jax.Array | None,
) -> jax.Array:
    """Zeros where a query sees no key; kernels spread such a query evenly over keys."""
    if not segments or segments[0] is segments[1]:  # a query sees at least itself
        return out_BTHK
    mask_BTS = _mask(out_BTHK, k_BSGK, causal, segments, 0, None, window, windowed)
    assert mask_BTS is not None  # of segments there is always one
    seeing_BT = jnp.any(mask_BTS, axis=-1)
    return jnp.where(seeing_BT[:, :, None, None], out_BTHK, jnp.zeros_like(out_BTHK))


def _attention_xla(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array | None,
    keep_BHTS: jax.Array | None,
    bias_HTS: jax.Array | None,
    keep_scale: float,
    softcap: float | None,
    operand: jnp.dtype,
) -> jax.Array:
    """Plain products, differentiated by jax; grouped heads share keys without copies."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K).astype(operand)
    scores_BGRTS = jnp.einsum(
        "BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK.astype(operand), preferred_element_type=jnp.float32
    ) * (K**-0.5)
    if softcap is not None:
        scores_BGRTS = softcap * jnp.tanh(scores_BGRTS / softcap)
    if bias_HTS is not None:
        scores_BGRTS += bias_HTS.reshape(1, G, H // G, *bias_HTS.shape[1:])
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
