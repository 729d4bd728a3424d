"""The gradient of a step's mean loss: over slices, over microbatches, with what rows carry."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lmjax import sharding
from lmjax.core import CARRY, Batch, Output, Task
from lmjax.engine.state import TrainState


def gradient_of(
    task: Task,
    microbatches: int,
    shardings: TrainState,
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
) -> tuple[Any, Output]:
    """The gradient of the batch's mean loss, and the batch's summed output.

    Slices sum their own gradients first, over devices that fast links join and over microbatches;
    the slow network then carries one sum of what each device holds. (Dropout differs from slice to
    slice, and so from the dropout of another number of slices.)
    """
    sums = functools.partial(_sums, task, microbatches, shardings.params, state)
    slices = sharding.axis_size("slices")
    if slices == 1 or state.model_state:
        gradient, output = sums(batch, rng)
    else:
        rows = {k: x.reshape(slices, -1, *x.shape[1:]) for k, x in batch.items()}
        rngs = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(slices))
        with sharding.mapped("slices"):
            by_slice = jax.vmap(sums, spmd_axis_name="slices")(rows, rngs)
        gradient, output = jax.tree.map(lambda x: jnp.sum(x, axis=0), by_slice)
    return jax.tree.map(lambda g: g / output.loss.weight, gradient), output


def _sums(
    task: Task, microbatches: int, shardings: Any, state: TrainState, batch: Batch, rng: jax.Array
) -> tuple[Any, Output]:
    """The gradient of the batch's total loss, and its output, microbatch after microbatch."""

    def total(params: Any, model_state: Any, part: Batch, key: jax.Array) -> tuple[Any, Output]:
        variables = {**state.variables(params), **model_state}
        output = task.loss(variables, part, key, train=True)
        return output.loss.total, output

    def differentiated(*args: Any) -> tuple[Any, Output]:
        gradient, output = jax.grad(total, has_aux=True)(*args)
        return jax.lax.with_sharding_constraint(gradient, shardings), output

    if microbatches == 1:
        return differentiated(state.params, state.model_state, batch, rng)
    carried = {CARRY: state.model_state[CARRY]} if CARRY in state.model_state else {}
    shared = {name: x for name, x in state.model_state.items() if name != CARRY}
    parts = _cut((dict(batch), carried), microbatches)

    def accumulate(carry: tuple[Any, Output], xs: Any) -> tuple[tuple[Any, Output], Any]:
        index, (part, carried) = xs
        gradient, total = carry
        key = jax.random.fold_in(rng, index)
        model_state = {**total.model_state, **carried}
        more, output = differentiated(state.params, model_state, part, key)
        model_state |= output.model_state
        loss, metrics = jax.tree.map(
            jnp.add, (total.loss, total.metrics), (output.loss, output.metrics)
        )
        carried = {name: model_state.pop(name) for name in carried}
        summed = Output(loss=loss, metrics=metrics, model_state=model_state)
        return (jax.tree.map(jnp.add, gradient, more), summed), carried

    part, rows = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(differentiated, state.params, {**shared, **rows}, part, rng)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes[0])
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), replace(shapes[1], model_state={}))
    start = (nothing, replace(empty, model_state=shared))
    (gradient, output), carried = jax.lax.scan(accumulate, start, (jnp.arange(microbatches), parts))
    return gradient, replace(output, model_state={**output.model_state, **_joined(carried)})


def _cut(rows: Any, microbatches: int) -> Any:
    """Rows i, i + m, ... make microbatch i of m: each device then cuts its own rows; none move."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), rows
    )


def _joined(parts: Any) -> Any:
    """Inverse of `_cut`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
