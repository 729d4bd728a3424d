"""Ring attention: exact attention over a sequence that is split over the mesh axis `context`.

Keys and values travel round the ring of devices while the queries stay, and each device folds what
passes into a running softmax. Outside, device i of n holds the i-th of n contiguous chunks. For a
causal mask that would leave device 0 idle and the last one late, so inside, the sequence is cut
into 2n halves, of which device i takes i and 2n - 1 - i (zigzag): then each device meets exactly
two visible pairs of halves at each step (three at the first, two of them triangular), and computes
no others. Halves are exchanged by permutations, never gathered.
"""

# Shape legend: B batch, T queries, S keys, H heads, G key-value heads, R = H / G, K head dim,
# P parts of the sequence that a device holds (2 halves if causal, else 1). Inside `_forward` and
# `_backward` all sizes are one device's.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.errors import UserError
from lmjax.ops import attention_zigzag as zigzag
from lmjax.ops.attention_zigzag import RING

# Queries are taken in blocks of at most so many, which bounds the scores that are alive at once.
_QUERY_BLOCK = 512

# Where the rows lie in arrays of queries, [P, B, G, R, T, ...].
_ROW_AXIS = 4
_QUERIES = ("batch", "length", "act_heads", None)
_KEYS = ("batch", "length", "act_kv_heads", None)
_PER_HEAD = ("batch", "length", "act_heads")
_ROWS = ("batch", "length")

Segments = tuple[jax.Array, jax.Array] | tuple[()]
Reach = tuple[jax.Array] | tuple[()]  # how many keys, itself the last, a query sees at most
# (arrays of some queries, what is updated of theirs, (k, v), mask_B11TS or None) ->
# (what was updated, what was found for k and v)
Block = Callable[[Any, Any, Any, jax.Array | None], tuple[Any, Any]]


class _Pairs(NamedTuple):
    """Pairs of a part of the queries and a part of the keys that it sees.

    In a triangular pair both are the same stretch of the sequence, of which a query sees what is
    not after it.
    """

    at_q: list[int | jax.Array]
    at_kv: list[int | jax.Array]
    triangular: list[bool] | None = None

    def at(self, index: int | jax.Array) -> tuple[Any, Any, Any]:
        """(part of the queries, part of the keys, whether triangular, None for never)."""
        queries, keys, diagonal = (None if x is None else jnp.asarray(x)[index] for x in self)
        return queries, keys, diagonal


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    causal: bool,
    segments: Segments = (),
    window: int | None = None,
    windowed: jax.Array | None = None,
    softcap: float | None = None,
    operand: jnp.dtype,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + mask) v, as out_BTHK; a query that sees no key gets zeros.

    Source: Liu et al., arXiv:2310.01889 (ring); Brandon et al., arXiv:2311.09431 (a causal mask
    wants another assignment of tokens to devices; here in the zigzag form, with whole halves). The
    running softmax and its gradient follow Dao, arXiv:2307.08691, section 3.1. Statistics and sums
    are float32; keys and values travel in `operand`, once for all heads that share them, and their
    gradients in float32. The backward pass keeps q, k, v, out and one logarithm per query and head,
    and goes round the ring again.

    Args:
      segments: (of the queries, of the keys), int [B, T] each; a query sees keys of its own only.
      window, windowed, softcap: see `ops.attention`. Pairs of halves that a window hides are
        computed all the same.
      operand: dtype of the operands of products.
      out_dtype: dtype of the result.

    Raises:
      UserError: where the mesh does not divide the length, the batch or the heads.
    """
    n = sharding.axis_size(RING)
    _check(q_BTHK.shape, k_BSGK.shape, n, causal)
    dtypes = (q_BTHK.dtype, k_BSGK.dtype, v_BSGK.dtype)
    reach: Reach = ()
    if window is not None:
        far = jnp.int32(jnp.iinfo(jnp.int32).max)
        reach = (jnp.int32(window) if windowed is None else jnp.where(windowed, window, far),)
    inputs = (_QUERIES, _KEYS, _KEYS, _ROWS, None)
    # Made here and not where they are called: the mesh in use may be gone by the backward pass.
    forward = sharding.per_device(
        partial(_forward, n, causal, softcap, out_dtype), inputs, (_QUERIES, _PER_HEAD)
    )
    backward = sharding.per_device(
        partial(_backward, n, causal, softcap, dtypes),
        (*inputs, _QUERIES, _PER_HEAD, _PER_HEAD),
        (_QUERIES, _KEYS, _KEYS),
    )

    @jax.custom_vjp
    def ring(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, reach: Reach
    ) -> jax.Array:
        return ring_fwd(q, k, v, segments, reach)[0]

    def ring_fwd(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, reach: Reach
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        q, k, v = (x.astype(operand) for x in (q, k, v))
        out, log_total = forward(q, k, v, segments, reach)
        return out, (q, k, v, segments, reach, out, log_total)

    def ring_bwd(residuals: tuple[Any, ...], dout: jax.Array) -> tuple[Any, ...]:
        q, k, v, segments, reach, out, log_total = residuals
        along = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        dout = dout.astype(operand)
        return (*backward(q, k, v, segments, reach, dout, log_total, along), None, None)

    ring.defvjp(ring_fwd, ring_bwd)
    return ring(q_BTHK, k_BSGK, v_BSGK, segments, reach)


def _check(q_shape: tuple[int, ...], k_shape: tuple[int, ...], n: int, causal: bool) -> None:
    B, T, H, _ = q_shape
    parts = 2 * n if causal else n
    if T % parts:
        near = " or ".join(str(m) for m in (T // parts * parts, -(-T // parts) * parts) if m)
        why = f"2 x context = {parts} (causal: two halves a device)" if causal else f"context = {n}"
        raise UserError(
            f"a length of {T} tokens does not divide by {why}. The nearest lengths that do: {near}."
        )
    for name, size in (("batch", B), ("act_heads", H), ("act_kv_heads", k_shape[2])):
        if size % (ways := sharding.ways(name)):
            raise UserError(
                f"attention over context = {n} devices has {size} along {name!r}, which the mesh "
                f"splits over {ways} devices: {size} must be a multiple of {ways}."
            )


def _forward(
    n: int,
    causal: bool,
    softcap: float | None,
    out_dtype: jnp.dtype,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments: Segments,
    reach: Reach,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTHK, log_BTH), the logarithm of each query's sum of exponentials."""
    T, G = q_BTHK.shape[1], k_BSGK.shape[2]
    marks_q, keys = _marks_and_keys(n, causal, k_BSGK, v_BSGK, segments, reach)
    q_PBGRTK = _queries(n, causal, q_BTHK, G)
    top_PBGRT = jnp.full(q_PBGRTK.shape[:-1], -jnp.inf, jnp.float32)
    state = (top_PBGRT, jnp.zeros_like(top_PBGRT), jnp.zeros(q_PBGRTK.shape, jnp.float32))
    (top, total, sums), _ = _ring(
        n, causal, partial(_fold, softcap), reach, (marks_q, q_PBGRTK), state, keys, ()
    )
    seeing = total > 0
    total = jnp.where(seeing, total, 1.0)
    # Infinity makes the probabilities of a query that sees no key zero in the backward pass.
    log_PBGRT = jnp.where(seeing, top + jnp.log(total), jnp.inf)
    out_PBGRTK = (sums / total[..., None]).astype(out_dtype)
    return _per_token(n, causal, out_PBGRTK, T), _per_token(n, causal, log_PBGRT, T)


def _fold(
    softcap: float | None, fixed: Any, state: Any, keys: Any, mask_B11TS: jax.Array | None
) -> tuple[Any, tuple[()]]:
    """Takes keys into the running softmax: (maxima, totals, weighted sums of values)."""
    (q_BGRTK,), (k_BGSK, v_BGSK), (top, total, sums) = fixed, keys, state
    scores_BGRTS, _ = _scores(softcap, q_BGRTK, k_BGSK, mask_B11TS)
    new_top = jnp.maximum(top, jnp.max(scores_BGRTS, axis=-1))
    base = jnp.where(new_top > -jnp.inf, new_top, 0.0)  # -inf: no key seen yet
    weights_BGRTS, fade = jnp.exp(scores_BGRTS - base[..., None]), jnp.exp(top - base)
    total = total * fade + jnp.sum(weights_BGRTS, axis=-1)
    more = _product("BGRTS,BGSK->BGRTK", weights_BGRTS.astype(v_BGSK.dtype), v_BGSK)
    return (new_top, total, sums * fade[..., None] + more), ()


def _backward(
    n: int,
    causal: bool,
    softcap: float | None,
    dtypes: tuple[jnp.dtype, ...],
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments: Segments,
    reach: Reach,
    dout_BTHK: jax.Array,
    log_BTH: jax.Array,
    along_BTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BTHK, dk_BSGK, dv_BSGK); `along` is the inner product of out and dout."""
    T, G = q_BTHK.shape[1], k_BSGK.shape[2]
    marks_q, keys = _marks_and_keys(n, causal, k_BSGK, v_BSGK, segments, reach)
    rows = [_queries(n, causal, x, G) for x in (q_BTHK, dout_BTHK, log_BTH, along_BTH)]
    dq, *dkv = (jnp.zeros(x.shape, jnp.float32) for x in (rows[0], *keys[1:]))
    pull = partial(_pull, softcap)
    dq, dkv = _ring(n, causal, pull, reach, (marks_q, *rows), dq, keys, tuple(dkv))
    dq, dk, dv = (x.astype(dtype) for x, dtype in zip((dq, *dkv), dtypes, strict=True))
    dk, dv = (zigzag.natural(n, causal, jnp.moveaxis(x, 2, 3)) for x in (dk, dv))
    return _per_token(n, causal, dq, T), dk, dv


def _pull(
    softcap: float | None,
    fixed: Any,
    dq_BGRTK: jax.Array,
    keys: Any,
    mask_B11TS: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Adds to the gradient of the queries, and finds that of the keys and values.

    Rows that pad the queries have dout = 0, and so no part in any gradient.
    """
    (q_BGRTK, dout_BGRTK, log_BGRT, along_BGRT), (k_BGSK, v_BGSK) = fixed, keys
    scores_BGRTS, slope_BGRTS = _scores(softcap, q_BGRTK, k_BGSK, mask_B11TS)
    probs_BGRTS = jnp.exp(scores_BGRTS - log_BGRT[..., None])
    dv_BGSK = _product("BGRTS,BGRTK->BGSK", probs_BGRTS.astype(v_BGSK.dtype), dout_BGRTK)
    dprobs_BGRTS = _product("BGRTK,BGSK->BGRTS", dout_BGRTK, v_BGSK)
    scale = q_BGRTK.shape[-1] ** -0.5
    dscores_BGRTS = probs_BGRTS * (dprobs_BGRTS - along_BGRT[..., None]) * scale
    if slope_BGRTS is not None:
        dscores_BGRTS *= slope_BGRTS
    dscores_BGRTS = dscores_BGRTS.astype(k_BGSK.dtype)
    dk_BGSK = _product("BGRTS,BGRTK->BGSK", dscores_BGRTS, q_BGRTK)
    dq_BGRTK += _product("BGRTS,BGSK->BGRTK", dscores_BGRTS, k_BGSK)
    return dq_BGRTK, (dk_BGSK, dv_BGSK)


def _ring(
    n: int, causal: bool, block: Block, reach: Reach, fixed: Any, carry: Any, keys: Any, zeros: Any
) -> tuple[Any, Any]:
    """Lets the keys of all devices pass by: (carry, what all devices found for our own keys).

    Each step sends the keys on before it looks at them, and what was found for them so far while it
    finds more: so communication can hide behind the products.

    Args:
      fixed, carry: [P, B, G or 1, R or 1, T, ...], of the queries: what is read, what is updated.
      keys: [P, B, ...], what travels.
      zeros: what is found for keys at first.
    """
    me = lax.axis_index(RING)

    def look(pairs: _Pairs, carry: Any, keys: Any) -> tuple[Any, Any]:
        return _look(block, pairs, reach, fixed, carry, keys, zeros)

    def pairs(step: int | jax.Array) -> _Pairs:
        """What is seen of the keys that come from device me - step, modulo n, at step > 0."""
        if not causal:
            return _Pairs([0], [0])
        # Both our halves see the early half of an earlier device, and neither its late one; our
        # late half sees both halves of a later device, and the early one neither.
        side = jnp.where(step <= me, 0, 1)
        return _Pairs([1, side], [0, side])

    def step(state: Any, index: jax.Array) -> tuple[Any, None]:
        carry, keys, found = state
        following, found = zigzag.send(n, (keys, found))
        carry, more = look(pairs(index), carry, keys)
        return (carry, following, jax.tree.map(jnp.add, found, more)), None

    following = zigzag.send(n, keys)
    own = _Pairs([0, 1, 1], [0, 0, 1], triangular=[True, False, True]) if causal else pairs(0)
    carry, found = look(own, carry, keys)
    state = (carry, following, found)
    if n > 2:
        state, _ = lax.scan(step, state, jnp.arange(1, n - 1))
    carry, keys, found = state
    found = zigzag.send(n, found)
    carry, more = look(pairs(n - 1), carry, keys)
    return carry, zigzag.send(n, jax.tree.map(jnp.add, found, more))


def _look(
    block: Block, pairs: _Pairs, reach: Reach, fixed: Any, carry: Any, keys: Any, found: Any
) -> tuple[Any, Any]:
    """Parts of the queries look at parts of the keys, block of queries by block."""
    T, S = fixed[1].shape[_ROW_AXIS], keys[1].shape[3]
    blocks = _num_blocks(T)
    size = T // blocks

    def one(index: int | jax.Array, both: Any) -> tuple[Any, Any]:
        carry, found = both
        at_q, at_kv, triangular = pairs.at(index // blocks)
        start = index % blocks * size

        def cut(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(_part(x, at_q), start, size, _ROW_AXIS - 1)

        def put(x: jax.Array, rows: jax.Array) -> jax.Array:
            at: list[Any] = [0] * x.ndim
            at[0], at[_ROW_AXIS] = at_q, start
            return lax.dynamic_update_slice(x, rows[None], at)

        def add(x: jax.Array, more: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(x, _part(x, at_kv) + more, at_kv, 0)

        marks_q, *rows = jax.tree.map(cut, fixed)
        marks_k, k, v = jax.tree.map(lambda x: _part(x, at_kv), keys)
        mask = None
        if "segment" in marks_q:
            mask = marks_q["segment"][..., None] == marks_k["segment"][:, None, None, None]
        if reach:
            distance = marks_q["index"][..., None] - marks_k["index"][:, None, None, None]
            near = distance < reach[0]
            mask = near if mask is None else mask & near
        if triangular is not None:
            row_T1 = start + jnp.arange(size)[:, None]
            before = ((row_T1 >= jnp.arange(S)[None]) | ~triangular)[None, None, None]
            mask = before if mask is None else mask & before
        new, more = block(rows, jax.tree.map(cut, carry), (k, v), mask)
        return jax.tree.map(put, carry, new), jax.tree.map(add, found, more)

    # A loop and not one after the other: the body is compiled once.
    steps = blocks * len(pairs.at_q)
    return one(0, (carry, found)) if steps == 1 else lax.fori_loop(0, steps, one, (carry, found))


def _scores(
    softcap: float | None, q_BGRTK: jax.Array, k_BGSK: jax.Array, mask_B11TS: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """(the masked scores, the slope of their cap if they have one)."""
    scores_BGRTS = _product("BGRTK,BGSK->BGRTS", q_BGRTK, k_BGSK) * q_BGRTK.shape[-1] ** -0.5
    slope_BGRTS = None
    if softcap is not None:
        share_BGRTS = jnp.tanh(scores_BGRTS / softcap)
        scores_BGRTS, slope_BGRTS = softcap * share_BGRTS, 1 - jnp.square(share_BGRTS)
    if mask_B11TS is not None:
        scores_BGRTS = jnp.where(mask_B11TS, scores_BGRTS, -jnp.inf)
    return scores_BGRTS, slope_BGRTS


def _product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _part(x: jax.Array, index: int | jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _num_blocks(rows: int) -> int:
    return -(-rows // _QUERY_BLOCK)


def _queries(n: int, causal: bool, x_BTH: jax.Array, num_groups: int) -> jax.Array:
    """[B, T, H, ...] -> [P, B, G, R, T / P, ...], its rows padded with zeros to whole blocks."""
    x = zigzag.parts(n, causal, x_BTH)
    P, B, T, H, *rest = x.shape
    x = jnp.moveaxis(x.reshape(P, B, T, num_groups, H // num_groups, *rest), 2, _ROW_AXIS)
    padding = [(0, 0)] * x.ndim
    padding[_ROW_AXIS] = (0, -T % _num_blocks(T))
    return jnp.pad(x, padding)


def _per_token(n: int, causal: bool, x_PBGRT: jax.Array, length: int) -> jax.Array:
    """Inverse of `_queries`, for a device's chunk of this length."""
    x = jnp.moveaxis(x_PBGRT, _ROW_AXIS, 2)[:, :, : length // x_PBGRT.shape[0]]
    return zigzag.natural(n, causal, x.reshape(*x.shape[:3], -1, *x.shape[5:]))


def _marks_and_keys(
    n: int, causal: bool, k_BSGK: jax.Array, v_BSGK: jax.Array, segments: Segments, reach: Reach
) -> tuple[dict[str, jax.Array], tuple[dict[str, jax.Array], jax.Array, jax.Array]]:
    """(marks_PB11T of the queries, (marks_PBS, k_PBGSK, v_PBGSK)).

    Marks are what a mask is made of: each token's segment, its index in the whole sequence.
    """
    k, v = (jnp.moveaxis(zigzag.parts(n, causal, x), 3, 2) for x in (k_BSGK, v_BSGK))
    marks = {"segment": segments} if segments else {}
    if reach:
        S = k_BSGK.shape[1]
        index_1S = lax.axis_index(RING) * S + jnp.arange(S)[None]
        marks["index"] = index_1S, index_1S
    of_queries = {name: _queries(n, causal, q[:, :, None], 1) for name, (q, _) in marks.items()}
    of_keys = {name: zigzag.parts(n, causal, x) for name, (_, x) in marks.items()}
    return of_queries, (of_keys, k, v)
