"""The training state, and the split of parameters into what trains and what is frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.core import CARRY, Task, Variables
from lmjax.engine.guard import Guard
from lmjax.engine.precision import Precision, keep
from lmjax.errors import UserError
from lmjax.sharding import Boxed


@struct.dataclass
class TrainState:
    """All that a step changes, arrays only. The step's randomness is a function of (seed, step).

    `params` holds what trains, `frozen` the rest; `variables` joins them. `model_state` is the
    task's mutable collections; one of them, `carry`, is what rows take from a batch to the next:
    its arrays have the batch's rows, and are split as they are. `guard` is what tells bad steps
    from good ones (`engine.guard`).
    """

    step: jax.Array
    params: Mapping[str, Any]
    frozen: Mapping[str, Any]
    model_state: Mapping[str, Any]
    opt_state: Any
    guard: Mapping[str, jax.Array]

    def variables(self, params: Mapping[str, Any] | None = None) -> Variables:
        """The variables that the task reads, with `params`, if given, for the trained ones.

        Without `carry`, which belongs to the rows of training.
        """
        trained = self.params if params is None else params
        others = {name: x for name, x in self.model_state.items() if name != CARRY}
        return {"params": merge(trained, self.frozen), **others}


def create_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, Any],
    *,
    batch_size: int,
    trainable: str,
    rng: jax.Array,
    precision: Precision,
    guard: Guard,
) -> TrainState:
    """Initialises every part of the state; parameters (and what mirrors them) come boxed.

    So does `carry`, which the task makes for the one row of `batch`, and which is then repeated for
    `batch_size` of them.
    """
    variables = dict(task.init(rng, batch))
    if CARRY in variables:
        variables[CARRY] = jax.tree.map(
            lambda x: Boxed(jnp.repeat(x, batch_size, axis=0), ("batch",) + (None,) * (x.ndim - 1)),
            variables[CARRY],
        )
    params, frozen = split(variables.pop("params"), trainable)
    _check_trains(params, trainable)
    params, frozen, opt_state = keep(precision, optimizer, params, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
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


def _check_trains(params: Mapping[str, Any], trainable: str) -> None:
    """Raises UserError where what is to train has no gradient."""
    for path, x in paths_of(params).items():
        dtype = (x.value if isinstance(x, Boxed) else x).dtype
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise UserError(
                f"trainable={trainable!r} chooses {path}, which is {dtype.name}: quantised weights "
                "have no gradient. Name what is to train beside them, as trainable='/lora/', or "
                "train the weights in float32 (quantized(aware=True))."
            )


def merge(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split`."""
    if not frozen:
        return dict(params)
    return unflatten_dict({**paths_of(params), **paths_of(frozen)}, sep="/")
