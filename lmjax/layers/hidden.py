"""Hidden states of inner layers, of any model that is made of `Stack`s, for who asks for them.

No model knows of it: while they are asked for, each `Stack` is told by an interceptor which of its
layers' outputs to keep, and sows them in the collection `transformer.HIDDEN`. Else none is kept.
"""

# Shape legend: B batch, T length, D embed.

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen as nn

from lmjax.errors import UserError
from lmjax.layers.transformer import KEPT, Stack


@dataclass
class Kept:
    """Which layers are wanted, and where they lie once a model was called.

    Args:
      wanted: layers of the model, from 0, through all of its stacks in the order of their calls.
      num_layers: of all stacks that were called.
      places: by layer, the path of its stack and its number among those that this one keeps.
    """

    wanted: Collection[int]
    num_layers: int = 0
    places: dict[int, tuple[tuple[str, ...], int]] = field(default_factory=dict)

    def __call__(
        self,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        """The interceptor."""
        stack = context.module
        if not isinstance(stack, Stack) or context.method_name != "__call__":
            return run(*args, **kwargs)
        own = range(self.num_layers, self.num_layers + stack.num_layers)
        layers = sorted({layer for layer in self.wanted if layer in own})
        self.places |= {layer: (stack.path, i) for i, layer in enumerate(layers)}
        self.num_layers += stack.num_layers
        return run(*args, **kwargs, keep=tuple(layer - own.start for layer in layers))


@contextlib.contextmanager
def keeping(layers: Collection[int]) -> Iterator[Kept]:
    """Has the stacks of the model that is called here sow these layers' hidden states.

    The call has to have `HIDDEN` among its mutable collections, which are read by `hidden_of`.
    """
    kept = Kept(layers)
    with nn.intercept_methods(kept):
        yield kept


def hidden_of(collection: Mapping[str, Any], kept: Kept, layers: Sequence[int]) -> list[jax.Array]:
    """The residual stream [B, T, D] behind each of these layers, before any norm of the model's.

    Args:
      collection: `HIDDEN`, of the call.
      kept: what `keeping` gave.
      layers: those wanted, in any order.

    Raises UserError for layers that there are not.
    """
    check_layers(layers, kept.num_layers, whose="the model")
    found = []
    for layer in layers:
        path, slot = kept.places[layer]
        part: Any = collection
        for name in path:
            part = part[name]
        found.append(part[KEPT][slot])
    return found


def num_layers_of(model: Any) -> int:
    """How many layers the stacks of a model have together, as it is made: nothing is called."""
    if isinstance(model, Stack):
        return model.num_layers
    if isinstance(model, nn.Module):
        fields = [field.name for field in dataclasses.fields(model)]
        return sum(num_layers_of(getattr(model, name)) for name in fields if name != "parent")
    if isinstance(model, tuple | list):
        return sum(map(num_layers_of, model))
    # A model with adapters says so what it wraps.
    return num_layers_of(model.__wrapped__) if hasattr(model, "__wrapped__") else 0


def check_layers(layers: Sequence[int], num_layers: int, *, whose: str) -> None:
    """Raises UserError, which says how many there are, for layers that are not of `num_layers`."""
    wrong = sorted({layer for layer in layers if not 0 <= layer < num_layers})
    if wrong and not num_layers:
        raise UserError(
            f"{whose} gives no hidden states of its layers: they are none of "
            "layers.transformer.Stack."
        )
    if wrong:
        raise UserError(
            f"{whose} has no layer {', '.join(map(str, wrong))}: it has {num_layers} layers, 0 to "
            f"{num_layers - 1}."
        )
