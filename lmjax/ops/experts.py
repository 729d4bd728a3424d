"""Tokens to their experts and back, on one device's tokens, with its share of the experts.

All functions run inside `sharding.per_device` (or on one device, where no axis has another member).
Rows are moved by index arrays alone: a move's gradient is the move back, never a scatter.
"""

# Shape legend: B rows, T length, N = B * T tokens of this device, k experts of a token, M = N * k
# copies of tokens, S slots, E experts of a layer, X devices along the axis `expert`, L = E / X
# experts of this device, C slots of an expert or of a device, D embed, F hidden.

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.ops.activations import swiglu
from lmjax.ops.grouped import batched, grouped
from lmjax.ops.matmul import activation_dtype

EXPERT = "expert"


class Kernels(NamedTuple):
    """The weights of this device's experts: gate and up [L, D, F], down [L, F, D]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def dropless(
    x_BTD: jax.Array,
    experts_BTk: jax.Array,
    weights_BTk: jax.Array,
    kernels: Kernels,
    *,
    num_experts: int,
    dtype: str,
) -> jax.Array:
    """Sum over a token's experts of weight * expert(token); every expert takes all that come.

    Source: Gale et al., MegaBlocks, arXiv:2211.15841: copies sorted by expert, and products over
    groups of unequal size. Between devices the copies go to the owners of their experts and
    return; a device has room for the worst case, all tokens of all devices of the axis.
    """
    k = experts_BTk.shape[-1]
    x_ND, experts_M = x_BTD.reshape(-1, x_BTD.shape[-1]), experts_BTk.reshape(-1)
    order_M, position_M = _sorted_by(experts_M)
    counts_E = _counts(experts_M, num_experts)
    if sharding.axis_size(EXPERT) == 1:
        x_MD = move(k, x_ND, order_M, position_M)
        y_MD = _swiglu_groups(x_MD, kernels, counts_E, dtype)
        y_MD = move(1, y_MD, position_M, order_M)
    else:
        room = len(x_ND) * min(k, kernels.gate.shape[0])
        exchange = _exchange_of(counts_E, room, dense=sharding.platform() == "cpu")
        y_MD = _through_owners(x_ND, kernels, exchange, order_M, position_M, k, dtype)
    return _weighted(y_MD, weights_BTk, dtype)


def capacity(
    x_BTD: jax.Array,
    experts_BTk: jax.Array,
    weights_BTk: jax.Array,
    kernels: Kernels,
    *,
    num_experts: int,
    factor: float,
    dtype: str,
) -> tuple[jax.Array, jax.Array]:
    """As `dropless`, but an expert takes at most C copies of each row, the earliest in it.

    Source: GShard, arXiv:2006.16668, section 2.2, with priority by position alone, and the group a
    row: C = ceil(factor * T * k / E). Where `context` splits the rows, each part is a group of its
    own. Copies beyond C add nothing to their token. Returns (y_BTD, dropped_BT): of each token, the
    number of its copies that were dropped.
    """
    B, T, D = x_BTD.shape
    E, k = num_experts, experts_BTk.shape[-1]
    C = slots_of_expert(T, k, E, factor)
    experts_BM = experts_BTk.reshape(B, T * k)
    order_BM, position_BM = _sorted_by(experts_BM)
    counts_BE = jax.vmap(partial(_counts, num_experts=E))(experts_BM)
    starts_BE = jnp.cumsum(counts_BE, axis=1) - counts_BE
    rank_BM = position_BM - jnp.take_along_axis(starts_BE, experts_BM, axis=1)
    row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    kept_BM = rank_BM < C
    slot_BM = jnp.where(kept_BM, (experts_BM * B + row_B1) * C + rank_BM, E * B * C)
    place_C = jnp.arange(C, dtype=jnp.int32)[None, None]
    index_BEC = (starts_BE[:, :, None] + place_C).reshape(B, E * C)
    copy_BEC = jnp.take_along_axis(order_BM, index_BEC, axis=1, mode="clip").reshape(B, E, C)
    copy_BEC = jnp.where(
        place_C < counts_BE[:, :, None], copy_BEC + row_B1[:, :, None] * (T * k), B * T * k
    )
    slot_M, copy_S = slot_BM.reshape(-1), jnp.swapaxes(copy_BEC, 0, 1).reshape(-1)

    x_ESD = move(k, x_BTD.reshape(-1, D), copy_S, slot_M).reshape(E, B * C, D)
    many = sharding.axis_size(EXPERT) > 1
    if many:
        x_ESD = lax.all_to_all(x_ESD, EXPERT, 0, 1, tiled=True)
    gate_ESF = batched(x_ESD, kernels.gate, dtype)
    up_ESF = batched(x_ESD, kernels.up, dtype)
    y_ESD = batched(swiglu(gate_ESF, up_ESF, dtype=dtype), kernels.down, dtype)
    if many:
        y_ESD = lax.all_to_all(y_ESD, EXPERT, 1, 0, tiled=True)
    y_MD = move(1, y_ESD.reshape(-1, D), slot_M, copy_S)
    dropped_BT = jnp.sum(~kept_BM.reshape(B, T, k), axis=-1).astype(jnp.float32)
    return _weighted(y_MD, weights_BTk, dtype), dropped_BT


def slots_of_expert(length: int, k: int, num_experts: int, factor: float) -> int:
    """Copies of one row that an expert takes; no more than a row has tokens."""
    return min(length, math.ceil(factor * length * k / num_experts))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def move(copies: int, x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Row i of the result is row source[i] // copies of x, or zeros where source[i] is beyond it.

    `target` is the inverse of `source`: where each row (each of its `copies`) of x went, or a
    number beyond the result for those that went nowhere.
    """
    del target
    return jnp.take(x, source // copies, axis=0, mode="fill", fill_value=0)


def _move_fwd(
    copies: int, x: jax.Array, source: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return move(copies, x, source, target), target


def _move_bwd(copies: int, target: jax.Array, dy: jax.Array) -> tuple[jax.Array, None, None]:
    dx = jnp.take(dy, target, axis=0, mode="fill", fill_value=0)
    if copies > 1:
        dx = dx.reshape(-1, copies, *dx.shape[1:])
        dx = jnp.sum(dx, axis=1, dtype=jnp.float32).astype(dy.dtype)
    return dx, None, None


move.defvjp(_move_fwd, _move_bwd)


def _sorted_by(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(which element comes at each place, at which place each element comes), equals in order."""
    order = jnp.argsort(keys, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.argsort(order, axis=-1).astype(jnp.int32)


def _counts(experts_M: jax.Array, num_experts: int) -> jax.Array:
    return jnp.bincount(experts_M, length=num_experts).astype(jnp.int32)


def _weighted(y_MD: jax.Array, weights_BTk: jax.Array, dtype: str) -> jax.Array:
    y_BTkD = y_MD.reshape(*weights_BTk.shape, -1).astype(jnp.float32)
    y_BTD = jnp.sum(y_BTkD * weights_BTk.astype(jnp.float32)[..., None], axis=2)
    return y_BTD.astype(activation_dtype(dtype))


# --- between devices ---


class _Exchange(NamedTuple):
    """Who sends how many rows to whom along `expert`, rows in the order of their experts.

    Args:
      sent_X: how many rows go to each device.
      received_X: how many come from each.
      offset_X: where at each receiver this device's rows begin.
      first_X: where among the sorted copies those for each receiver begin.
      start_X: where in the received buffer the rows of each sender begin.
      return_X: where at each sender its rows for this device begin.
      counts_XL: rows by sender and expert of this device.
      room: rows that one sender may send here.
      dense: whether each sender's part is padded to `room`, for a platform without a ragged
        exchange; else the parts lie gapless.
    """

    sent_X: jax.Array
    received_X: jax.Array
    offset_X: jax.Array
    first_X: jax.Array
    start_X: jax.Array
    return_X: jax.Array
    counts_XL: jax.Array
    room: int
    dense: bool


def _exchange_of(counts_E: jax.Array, room: int, *, dense: bool) -> _Exchange:
    X, me = sharding.axis_size(EXPERT), lax.axis_index(EXPERT)
    counts_XXL = lax.all_gather(counts_E, EXPERT).reshape(X, X, -1)  # sender, receiver, expert
    sizes_XX = jnp.sum(counts_XXL, axis=-1)

    def before(sizes: jax.Array, axis: int) -> jax.Array:
        return jnp.cumsum(sizes, axis=axis) - sizes

    def column(matrix: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(matrix, me, axis=1, keepdims=False)

    def row(matrix: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(matrix, me, axis=0, keepdims=False)

    start_X = jnp.arange(X, dtype=jnp.int32) * room if dense else column(before(sizes_XX, 0))
    return _Exchange(
        sent_X=row(sizes_XX),
        received_X=column(sizes_XX),
        offset_X=row(before(sizes_XX, 0)),
        first_X=row(before(sizes_XX, 1)),
        start_X=start_X,
        return_X=column(before(sizes_XX, 1)),
        counts_XL=column(counts_XXL),
        room=room,
        dense=dense,
    )


def _through_owners(
    x_ND: jax.Array,
    kernels: Kernels,
    exchange: _Exchange,
    order_M: jax.Array,
    position_M: jax.Array,
    k: int,
    dtype: str,
) -> jax.Array:
    """Each copy through its expert on the device that has it, as y_MD in the order of copies."""
    X, M, room = len(exchange.counts_XL), len(order_M), exchange.room
    if exchange.dense:
        place_C = jnp.arange(room, dtype=jnp.int32)[None]
        index_XC = jnp.clip(exchange.first_X[:, None] + place_C, 0, M - 1)
        source_XC = jnp.where(place_C < exchange.sent_X[:, None], order_M[index_XC], M)
        # Sorted copies for device j begin at first_X[j], and go to the part of the buffer at j.
        owner_M = jnp.sum(position_M[:, None] >= exchange.first_X[None, 1:], axis=1)
        target_M = owner_M * room + position_M - exchange.first_X[owner_M]
        source_S, target_M = source_XC.reshape(-1), target_M.astype(jnp.int32)
        received_SD = lax.all_to_all(move(k, x_ND, source_S, target_M), EXPERT, 0, 0, tiled=True)
    else:
        received_SD = _ragged(move(k, x_ND, order_M, position_M), exchange)
    expert_S = _expert_of_rows(exchange, X * room)
    order_S, position_S = _sorted_by(expert_S)
    sizes_L = jnp.sum(exchange.counts_XL, axis=0)
    y_SD = _swiglu_groups(move(1, received_SD, order_S, position_S), kernels, sizes_L, dtype)
    # Rows of no expert, last in order, hold anything; no copy's target is among them.
    y_SD = move(1, y_SD, position_S, order_S)
    if exchange.dense:
        y_SD = lax.all_to_all(y_SD, EXPERT, 0, 0, tiled=True)
        return move(1, y_SD, target_M, source_S)
    return move(1, _ragged_back(y_SD, exchange, M), position_M, order_M)


def _expert_of_rows(exchange: _Exchange, num_rows: int) -> jax.Array:
    """Which of this device's L experts each received row is for; L for a row that nobody sent."""
    row_S = jnp.arange(num_rows, dtype=jnp.int32)
    X, L = exchange.counts_XL.shape
    ends = (exchange.start_X[:, None] + jnp.cumsum(exchange.counts_XL, axis=1)).reshape(-1)
    group_S = jnp.sum(row_S[:, None] >= ends[None], axis=1)  # senders one after another
    starts = jnp.append(exchange.start_X, num_rows)
    sent_S = row_S >= starts[jnp.minimum(group_S // L, X)]
    return jnp.where(sent_S & (group_S < X * L), group_S % L, L).astype(jnp.int32)


def _ragged(x_MD: jax.Array, exchange: _Exchange) -> jax.Array:
    """Sorted rows to the owners of their experts; what arrives lies gapless, by sender."""
    rows = len(exchange.sent_X) * exchange.room
    return _ragged_exchange(rows, len(x_MD), x_MD, *_ragged_sizes(exchange))


def _ragged_back(y_SD: jax.Array, exchange: _Exchange, num_copies: int) -> jax.Array:
    """The inverse of `_ragged`."""
    there, back = _ragged_sizes(exchange)
    return _ragged_exchange(num_copies, len(y_SD), y_SD, back, there)


def _ragged_sizes(exchange: _Exchange) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """(input offsets, sizes sent, offsets at the receivers, sizes received) there and back."""
    there = exchange.first_X, exchange.sent_X, exchange.offset_X, exchange.received_X
    return there, (exchange.start_X, exchange.received_X, exchange.return_X, exchange.sent_X)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_exchange(
    num_out: int, num_in: int, x: jax.Array, sizes: tuple[jax.Array, ...], back: Any
) -> jax.Array:
    del num_in, back
    out = jnp.zeros((num_out, *x.shape[1:]), x.dtype)
    return lax.ragged_all_to_all(x, out, *sizes, axis_name=EXPERT)


def _ragged_exchange_fwd(
    num_out: int, num_in: int, x: jax.Array, sizes: tuple[jax.Array, ...], back: Any
) -> tuple[jax.Array, tuple[Any, Any]]:
    return _ragged_exchange(num_out, num_in, x, sizes, back), (sizes, back)


def _ragged_exchange_bwd(
    num_out: int, num_in: int, residuals: tuple[Any, Any], dy: jax.Array
) -> tuple[jax.Array, None, None]:
    sizes, back = residuals
    return _ragged_exchange(num_in, num_out, dy, back, sizes), None, None


_ragged_exchange.defvjp(_ragged_exchange_fwd, _ragged_exchange_bwd)


def _swiglu_groups(x_SD: jax.Array, kernels: Kernels, sizes_L: jax.Array, dtype: str) -> jax.Array:
    gate_SF = grouped(x_SD, kernels.gate, sizes_L, dtype)
    up_SF = grouped(x_SD, kernels.up, sizes_L, dtype)
    return grouped(swiglu(gate_SF, up_SF, dtype=dtype), kernels.down, sizes_L, dtype)
