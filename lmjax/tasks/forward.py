"""One call of a model by a task: with its mutable state, and with inner layers' hidden states."""

# B batch, T length, D embed.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from lmjax.core import Variables
from lmjax.layers.hidden import hidden_of, keeping
from lmjax.layers.transformer import HIDDEN


def forward(
    model: Any,
    variables: Variables,
    *inputs: Any,
    rng: jax.Array | None = None,
    train: bool,
    layers: Sequence[int] = (),
    **arguments: Any,
) -> tuple[Any, dict[str, Any], list[jax.Array]]:
    """What a model makes of its inputs, its collections after it, and layers' hidden states.

    The collections are those that training changes, all beside the parameters; without training
    none: what a task's `Output.model_state` does not name stays as it was.

    Args:
      model: a linen module, or what stands for one.
      variables: its own.
      inputs: what `apply` takes behind them.
      rng: of dropout, in training.
      train: whether the model is trained.
      layers: of which the hidden states [B, T, D] are wanted, from 0, through all of the model's
        stacks (`layers.hidden`); in this order.
      arguments: what else `apply` takes by name.

    Raises UserError where the model has no such layers, or gives no hidden states of them.
    """
    if train and rng is not None:
        arguments = {**arguments, "rngs": {"dropout": rng}}
    changing = sorted(name for name in variables if train and name != "params")
    mutable = [*changing, *([HIDDEN] if layers else [])]
    if not mutable:
        return model.apply(variables, *inputs, train=train, **arguments), {}, []
    with keeping(layers) as kept:
        output, changed = model.apply(variables, *inputs, train=train, mutable=mutable, **arguments)
    state = {name: changed[name] for name in changing}
    return output, state, hidden_of(changed.get(HIDDEN, {}), kept, layers)
