"""Keys and values that come before every text."""

# P length of the prefix, G key-value heads, K head dim

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import linen as nn

from lmjax import sharding
from lmjax.errors import UserError
from lmjax.layers.attention import Attention


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """In each layer, keys and values of its own that every token sees before it sees the text.

    Source: Li & Liang, "Prefix-Tuning", arXiv:2101.00190, section 4.2. Departures: the vectors
    train as they are, without the network that the paper makes them of while it trains (section
    4.3: lower the learning rate, lengthen the warm-up); and positions count from the text's start:
    keys of a prefix are not rotated. It is seen from all segments of a packed row. The model is
    another one from the start: no values of these vectors add nothing.

    Args:
      targets: which self-attentions, by the ends of their paths, as in `Lora`.
      length: P.
      init_std: of the vectors.
      name: in the paths of its parameters.
    """

    targets: tuple[str, ...] = ("attention",)
    length: int = 16
    init_std: float = 0.02
    name: str = "prefix"

    def __post_init__(self) -> None:
        if not self.targets or isinstance(self.targets, str):
            raise UserError(f"{self.name}.targets is {self.targets!r}: give ('attention',).")
        if self.length < 1:
            raise UserError(f"{self.name}.length is {self.length}: must be at least 1.")

    def pairs(self, attention: Attention) -> tuple[jax.Array, jax.Array]:
        """(keys, values), each [P, G, K]; called inside of the module."""
        shape = (self.length, attention.num_kv_heads, attention.head_dim)
        return _Pairs(shape, self.init_std, name=self.name)()


class _Pairs(nn.Module):
    """The parameters."""

    shape: tuple[int, int, int]
    init_std: float

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        init, axes = nn.initializers.normal(self.init_std), (None, "kv_heads", "head_dim")
        keys = sharding.param(self, "keys", init, self.shape, axes)
        return keys, sharding.param(self, "values", init, self.shape, axes)
