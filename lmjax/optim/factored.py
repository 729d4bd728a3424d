"""Second moments as means over rows and columns, of each matrix of a stack for itself."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.sharding import Boxed

STACKING = ("layers", "experts")  # names of leading axes along which matrices lie side by side


class FactoredState(NamedTuple):
    """The updates made so far, and the second moment of each parameter.

    `rows` [*stack, largest axis] and `columns` [*stack, *other axes] are its means over the rest;
    `whole` is the moment itself, of what is too small to factor. Each keeps the names of its axes,
    and is sharded by them.
    """

    step: jax.Array
    rows: Any
    columns: Any
    whole: Any


def scale_by_factored_rms(
    *, decay_rate: float, min_dim_factored: int, clip: float, epsilon: float = 1e-30
) -> optax.GradientTransformation:
    """Divides by the root of a factored second moment, and clips each matrix's root mean square.

    Source: Shazeer & Stern, arXiv:1804.04235, algorithms 4 and 5, with the decay of section 7.2.
    A parameter whose axes are named is a stack of matrices over its leading `layers` and `experts`
    axes. The rows of a matrix run along its largest axis and its columns along all others: heads
    and their dimension are one axis of columns, as in the paper's matrices.

    Args:
      decay_rate: c of b2_t = 1 - t^-c.
      min_dim_factored: matrices with fewer rows or columns keep the whole moment.
      clip: the most that the root mean square of a matrix's update may be.
    """

    def init(params: Any) -> FactoredState:
        def of(param: Any) -> tuple[Any, Any, Any]:
            value, axes = (
                (param.value, param.axes)
                if isinstance(param, Boxed)
                else (param, (None,) * param.ndim)
            )
            stacked = next((i for i, a in enumerate(axes) if a not in STACKING), len(axes))
            shape, row = value.shape, _row_axis(value.shape, stacked)
            if row is None or min(shape[row], _columns(shape, stacked, row)) < min_dim_factored:
                # Its rank says how many axes are stacked, once the names are gone.
                return jnp.zeros((1,) * (stacked + 1)), None, _boxed(param, value.shape, axes)
            other = [i for i in range(value.ndim) if i != row]
            kept = [*range(stacked), row]
            return (
                _boxed(param, tuple(shape[i] for i in kept), tuple(axes[i] for i in kept)),
                _boxed(param, tuple(shape[i] for i in other), tuple(axes[i] for i in other)),
                None,
            )

        leaves, structure = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Boxed))
        parts = zip(*map(of, leaves), strict=True)
        trees = (jax.tree.unflatten(structure, part) for part in parts)
        return FactoredState(jnp.zeros((), jnp.int32), *trees)

    def update(updates: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        step = state.step + 1
        b2 = 1 - step.astype(jnp.float32) ** -decay_rate

        def of(gradient: jax.Array, rows: Any, columns: Any, whole: Any) -> tuple[Any, ...]:
            stacked, shape = rows.ndim - 1, gradient.shape
            square = gradient**2 + epsilon
            if columns is None:
                whole = b2 * whole + (1 - b2) * square
                update = gradient * jax.lax.rsqrt(whole)
            else:
                row = _row_axis(shape, stacked)
                assert row is not None
                others = tuple(i for i in range(stacked, gradient.ndim) if i != row)
                rows = b2 * rows + (1 - b2) * jnp.mean(square, axis=others)
                columns = b2 * columns + (1 - b2) * jnp.mean(square, axis=row)
                mean = jnp.mean(rows, axis=-1, keepdims=True)
                by_row = jnp.expand_dims(jax.lax.rsqrt(rows / mean), others)
                update = gradient * by_row * jnp.expand_dims(jax.lax.rsqrt(columns), row)
            matrix = tuple(range(stacked, gradient.ndim))
            rms = jnp.sqrt(jnp.mean(update**2, axis=matrix, keepdims=True))
            return update / jnp.maximum(1, rms / clip), rows, columns, whole

        leaves, structure = jax.tree.flatten(updates)
        kept = (
            jax.tree.leaves(tree, is_leaf=lambda x: x is None)
            for tree in (state.rows, state.columns, state.whole)
        )
        parts = zip(*map(of, leaves, *kept), strict=True)
        new, *moments = (jax.tree.unflatten(structure, part) for part in parts)
        return new, FactoredState(step, *moments)

    return optax.GradientTransformation(init, update)


def _row_axis(shape: tuple[int, ...], stacked: int) -> int | None:
    """The largest axis after the stacked ones, the last of several; None where fewer than two."""
    if len(shape) - stacked < 2:
        return None
    return max(range(stacked, len(shape)), key=lambda i: (shape[i], i))


def _columns(shape: tuple[int, ...], stacked: int, row: int) -> int:
    return math.prod(shape[stacked:]) // shape[row]


def _boxed(param: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
    zeros = jnp.zeros(shape, jnp.float32)
    return Boxed(zeros, axes) if isinstance(param, Boxed) else zeros
