"""The training state, and the split of parameters into what trains and what is frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.core import Task, Variables
from lmjax.engine.guard import Guard
from lmjax.engine.precision import Precision, keep
from lmjax.errors import UserError
from lmjax.sharding import Boxed


@struct.dataclass
class TrainState:
    """All that a step changes, arrays only. The step's randomness is a function of (seed, step).

    `params` holds what trains, `frozen` the rest; `variables` joins them. `guard` is what tells bad
    steps from good ones (`engine.guard`).
    """

    step: jax.Array
    params: Mapping[str, Any]
    frozen: Mapping[str, Any]
    model_state: Mapping[str, Any]
    opt_state: Any
    guard: Mapping[str, jax.Array]

    def variables(self, params: Mapping[str, Any] | None = None) -> Variables:
        """The variables that the task reads, with `params`, if given, for the trained ones."""
        trained = self.params if params is None else params
        return {"params": merge(trained, self.frozen), **self.model_state}


def create_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, Any],
    *,
    trainable: str,
    rng: jax.Array,
    precision: Precision,
    guard: Guard,
) -> TrainState:
    """Initialises every part of the state; parameters (and what mirrors them) come boxed."""
    variables = dict(task.init(rng, batch))
    params, frozen = split(variables.pop("params"), trainable)
    params, frozen, opt_state = keep(precision, optimizer, params, frozen)
    return TrainState(
        step=jax.numpy.zeros((), "int32"),
        params=params,
        frozen=frozen,
        model_state=variables,
        opt_state=opt_state,
        guard=guard.start(),
    )


def paths_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path ('blocks/attention/query/kernel'); boxes count as leaves."""
    return flatten_dict(dict(params), sep="/", is_leaf=lambda _, x: isinstance(x, Boxed))


def split(params: Mapping[str, Any], trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits by path into (those in which the regex `trainable` is found, the rest)."""
    flat = paths_of(params)
    chosen = {k: v for k, v in flat.items() if re.search(trainable, k)}
    if not chosen:
        some = ", ".join(list(flat)[:8])
        raise UserError(f"trainable={trainable!r} matches no parameter. There are: {some}, ...")
    rest = {k: v for k, v in flat.items() if k not in chosen}
    return unflatten_dict(chosen, sep="/"), unflatten_dict(rest, sep="/")


def merge(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split`."""
    if not frozen:
        return dict(params)
    return unflatten_dict({**paths_of(params), **paths_of(frozen)}, sep="/")
