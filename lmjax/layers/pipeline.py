"""A stack of layers as a pipeline over the mesh axis `stage`.

One program for all devices: an array [S, ...] holds what each stage works on, split over `stage`;
at each tick all stages apply their layers (`vmap`), and the array is rolled by one, which sends
each stage's result to the next. Sources: GPipe, arXiv:1811.06965, section 2.3 (repeats = 1);
Narayanan et al., arXiv:2104.04473, section 2.2 (repeats > 1: a stage holds several runs of layers,
and a microbatch goes round the stages once for each); as one program of arrays: GSPMD,
arXiv:2105.04663, section 3.3.

Work item i = r M + m, microbatch m in its round r, is at stage s in tick i + s. So a step takes
R M + S - 1 ticks of 1 / (R S) of the layers each, of which a stage idles in S - 1: a share of
(S - 1) / (R M + S - 1). An idle stage computes on stale numbers, which nothing reads.

Costs beside the idle ticks:
  - in each tick every stage sends one microbatch's activations to the next;
  - what goes in and what comes out is on all stages: each direction sums one array of activations
    over `stage`, once in a step;
  - weights split over `fsdp` are gathered in every tick;
  - with R > 1, parameters stay stored in the order of the layers, stage s with a run of L / S of
    them, so that no checkpoint depends on the layout. Each step moves every layer's weights once to
    the stage that computes it, and its gradient back; and without remat, the weights that a tick
    uses are kept for its backward pass.
"""

# Shape legend: B batch, b rows of a microbatch, T length, D embed, S stages, M microbatches,
# R repeats, L layers, N = L / (R S) layers that a stage applies in a tick.

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.core import Mean
from lmjax.errors import UserError
from lmjax.sharding import Pipeline, shard

Axes = tuple[str | None, ...]
# (parameters of one layer, x_BTD, index of the layer, index of the microbatch,
#  {name: array [B or 1, T] that goes along with x}) -> (x_BTD, aux)
Layer = Callable[..., tuple[jax.Array, dict[str, Mean]]]


def pipelined(
    layer: Layer,
    params: Any,
    x_BTD: jax.Array,
    along: dict[str, jax.Array],
    *,
    num_layers: int,
    axes: Callable[[], Any],
    plan: Pipeline,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    unroll: int = 1,
) -> tuple[jax.Array, dict[str, Mean]]:
    """`layer` applied `num_layers` times, and its aux added up; equal to a loop over the layers.

    Where `layer` is random it has to tell microbatches apart by the index that it is given.

    Args:
      params: the layers' parameters, stacked: every leaf is [L, ...].
      axes: gives the names of a layer's axes, a tuple for each leaf of `params`; called where there
        are several rounds.
      along: arrays of which a layer needs the rows that it has of x: [B, T], or [1, T] for all.
      wrap: makes a layer's backward pass compute again what its policy drops.
      unroll: how many layers stand in the body of the loop over those of a stage.

    Raises:
      UserError: where the stages, rounds or microbatches do not divide layers or batch.
    """
    S, M, R = plan.stages, plan.microbatches, plan.repeats
    N = num_layers // (S * R)
    _check(num_layers, x_BTD.shape[0], plan)
    x_MbTD = shard(_cut(x_BTD, M), None, "batch", "residual", "act_embed")
    shared = {name: x for name, x in along.items() if x.shape[0] == 1 < x_BTD.shape[0]}
    cut = {name: _cut(x, M) for name, x in along.items() if name not in shared}
    names = axes() if R > 1 else jax.tree.map(lambda _: (), params)
    weights_SN = jax.tree.map(partial(_by_stage, plan), params, names)

    def stage(
        weights_N: Any, x_bTD: jax.Array, microbatch: jax.Array, turn: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, dict[str, Mean]]:
        here = {name: shard(_at(x, microbatch), "batch", "length") for name, x in cut.items()}

        def body(x_bTD: jax.Array, xs: Any) -> tuple[jax.Array, dict[str, Mean]]:
            weights, n = xs
            if R > 1:  # chosen inside of what is computed again, so that no copies are kept
                weights = jax.tree.map(lambda w: _at(w, turn), weights)
            return layer(weights, x_bTD, (turn * S + index) * N + n, microbatch, {**shared, **here})

        xs = (weights_N, jnp.arange(N))
        x_bTD, aux = lax.scan(wrap(body), x_bTD, xs, unroll=min(unroll, N))
        return x_bTD, jax.tree.map(lambda total: jnp.sum(total, axis=0), aux)

    stages = jnp.arange(S)
    all_stages = jax.vmap(stage, spmd_axis_name="stage")

    def tick(
        carry: tuple[jax.Array, jax.Array], t: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, Mean]]:
        x_SbTD, slots_SMbTD = carry
        fed_SbTD = lax.dynamic_index_in_dim(slots_SMbTD, t % M, axis=1, keepdims=False)
        x_SbTD = _on_stages(jnp.where(_over(stages == 0, x_SbTD), fed_SbTD, x_SbTD))
        item = t - stages
        turn, valid = jnp.clip(item // M, 0, R - 1), (item >= 0) & (item < R * M)
        with sharding.mapped("stage"):
            y_SbTD, aux = all_stages(weights_SN, x_SbTD, item % M, turn, stages)
        y_SbTD = _to_next(_on_stages(y_SbTD))
        aux = jax.tree.map(
            lambda total: jnp.sum(jnp.where(_over(valid, total), total, 0), axis=0), aux
        )
        # Stage 0 now has what the last one made, of item t - (S - 1): it waits in that slot for its
        # next round, or for the end. The other stages' slots are never read.
        slot = (t - (S - 1)) % M
        old_SbTD = lax.dynamic_index_in_dim(slots_SMbTD, slot, axis=1, keepdims=False)
        new_SbTD = jnp.where(t >= S - 1, y_SbTD, old_SbTD)
        slots_SMbTD = lax.dynamic_update_index_in_dim(slots_SMbTD, new_SbTD, slot, axis=1)
        return (y_SbTD, slots_SMbTD), aux

    slots_SMbTD = _on_stages(jnp.broadcast_to(x_MbTD[None], (S, *x_MbTD.shape)))
    # Stages that have no work yet get real rows, not zeros: nothing is then divided by zero.
    start_SbTD = lax.stop_gradient(_on_stages(jnp.broadcast_to(x_MbTD[:1], (S, *x_MbTD.shape[1:]))))
    ticks = jnp.arange(R * M + S - 1)
    (_, slots_SMbTD), aux = lax.scan(tick, (start_SbTD, slots_SMbTD), ticks)
    # A sum of zeros and one stage's numbers: an index into the split axis would gather all stages'.
    first_SMbTD = jnp.where(_over(stages == 0, slots_SMbTD), slots_SMbTD, 0)
    y_MbTD = lax.reduce_sum(first_SMbTD, axes=(0,))  # in the dtype that it has
    y_MbTD = shard(y_MbTD, None, "batch", "residual", "act_embed")
    y_BTD = jnp.moveaxis(y_MbTD, 0, 1).reshape(x_BTD.shape)
    y_BTD = shard(y_BTD, "batch", "residual", "act_embed")
    return y_BTD, jax.tree.map(lambda total: jnp.sum(total, axis=0), aux)


def _check(num_layers: int, batch_size: int, plan: Pipeline) -> None:
    S, M, R = plan.stages, plan.microbatches, plan.repeats
    if num_layers % (S * R):
        fits = [r for r in range(1, num_layers // S + 1) if num_layers % (S * r) == 0]
        repeats = f"stage_repeats that fit: {', '.join(map(str, fits))}. " if fits else ""
        stages = [s for s in range(1, num_layers + 1) if num_layers % (s * R) == 0]
        split = f"stages that fit: {', '.join(map(str, stages))}. " if stages else ""
        raise UserError(
            f"{num_layers} layers do not divide into stage={S} x stage_repeats={R}. "
            f"With stage={S}, {repeats or 'no stage_repeats fits. '}"
            f"With stage_repeats={R}, {split or 'no number of stages fits. '}"
            f"The nearest numbers of layers that divide: {_near(num_layers, S * R)}."
        )
    if R > 1 and M < S:
        raise UserError(
            f"stage_microbatches={M} are fewer than stage={S}, and with stage_repeats={R} a "
            f"microbatch would come round before its turn: set stage_microbatches to at least {S}, "
            "or stage_repeats to 1."
        )
    ways = math.prod(sharding.axis_size(axis) for axis in sharding.split_axes("batch"))
    if batch_size % (ways * M):
        fits = [m for m in range(1, batch_size + 1) if batch_size % (ways * m) == 0]
        near = sorted(sorted(fits, key=lambda m: abs(m - M))[:3])
        other = f" stage_microbatches that do: {', '.join(map(str, near))}." if near else ""
        raise UserError(
            f"a batch of {batch_size} rows (of one of the step's microbatches and slices) does not "
            f"divide into stage_microbatches={M} x {ways} data-parallel parts. The nearest "
            f"sizes that do: {_near(batch_size, ways * M)}.{other}"
        )


def _near(number: int, parts: int) -> str:
    lower, upper = number // parts * parts, -(-number // parts) * parts
    return " or ".join(str(n) for n in dict.fromkeys((lower, upper)) if n)


def _cut(x: jax.Array, num_parts: int) -> jax.Array:
    """[B, ...] -> [M, B / M, ...]: rows m, m + M, ... are microbatch m, so no row moves."""
    return jnp.moveaxis(x.reshape(-1, num_parts, *x.shape[1:]), 1, 0)


def _by_stage(plan: Pipeline, w_L: jax.Array, axes: Axes) -> jax.Array:
    """[L, ...] -> [S, N, ...], or [S, N, R, ...] for several rounds; `axes` are names of the rest.

    Run c of R S runs of layers lies on stage c // R and is computed on stage c % S, as its run
    c // S. The runs go in R permutations, each with one run from and one to every stage: run c in
    permutation (c + c // lcm(R, S)) % R.
    """
    S, R, rest = plan.stages, plan.repeats, w_L.shape[1:]
    if R == 1:
        return w_L.reshape(S, -1, *rest)
    runs = [[c for c in range(R * S) if (c + c // math.lcm(R, S)) % R == k] for k in range(R)]

    def local(w_RN: jax.Array) -> jax.Array:
        w_RN = w_RN.reshape(R, -1, *w_RN.shape[1:])
        mine, moved = lax.axis_index("stage"), jnp.zeros_like(w_RN)
        for batch in runs:
            sent = jnp.asarray([c % R for c in sorted(batch, key=lambda c: c // R)])[mine]
            place = jnp.asarray([c // S for c in sorted(batch, key=lambda c: c % S)])[mine]
            got = lax.ppermute(_at(w_RN, sent), "stage", [(c // R, c % S) for c in batch])
            moved = lax.dynamic_update_index_in_dim(moved, got, place, axis=0)
        return jnp.moveaxis(moved, 0, 1)[None]

    names = ("layers", *axes)
    return sharding.per_device(local, (names,), ("layers", None, None, *axes))(w_L)


@jax.custom_vjp
def _to_next(x_SbTD: jax.Array) -> jax.Array:
    """Each stage's rows to the next stage, the last one's to the first."""
    return _on_stages(jnp.roll(x_SbTD, 1, axis=0))


# Differentiated by jax, the two slices of a roll would each be sent back on their own.
_to_next.defvjp(
    lambda x_SbTD: (_to_next(x_SbTD), None),
    lambda _, dx_SbTD: (_on_stages(jnp.roll(dx_SbTD, -1, axis=0)),),
)


def _on_stages(x: jax.Array) -> jax.Array:
    """x_SbTD or slots_SMbTD, its first axis over the stages."""
    middle = (None,) * (x.ndim - 4)
    return shard(x, "act_layers", *middle, "batch", "residual", "act_embed")


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _over(x_S: jax.Array, like: jax.Array) -> jax.Array:
    """[S] -> [S, 1, ...], to go with an array of that rank."""
    return x_S.reshape(-1, *(1,) * (like.ndim - 1))
