"""What adds: means, and what a task returns of a batch; and the names of what goes around."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Name -> array whose first axis is the batch; numpy on the host, jax on a device.
Batch = Mapping[str, Any]
# Linen collections: "params" and, where a model has any, mutable state.
Variables = Mapping[str, Any]
Spec = Mapping[str, jax.ShapeDtypeStruct]  # one example, without the batch axis
# The collection of what rows take from a training batch to the next. Its arrays have a row for each
# of the batch's; `Task.init` makes them for one.
CARRY = "carry"
# The branch of "params" for what a task has beside its model (a teacher): inference reads none.
ASIDE = "aside"


@struct.dataclass
class Mean:
    """A mean as (total, weight), which adds: merging two sets of observations is `+`."""

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> jax.Array:
        """total / weight; NaN for a mean of nothing."""
        return self.total / self.weight

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | None = None) -> Mean:
        """The weighted mean of an array of observations (weights are one where absent)."""
        if weights is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
        return cls(jnp.sum(values * weights), jnp.sum(weights).astype(jnp.float32))


@struct.dataclass
class Output:
    """What a task's loss returns: the loss to descend, what to report, and mutable model state.

    The reported `loss` is the one descended unless `metrics` holds another of that name.
    """

    loss: Mean
    metrics: dict[str, Mean]
    model_state: Any = struct.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The analytic cost of one training example, forward and backward.

    Args:
      unit: what throughput is counted in ("tokens", "images").
      units: how many of them one example holds.
      flop: multiply-adds counted as two, attention counted as computed for a causal mask (half).
      flop_full: the same with attention counted in full, as in PaLM, arXiv:2204.02311, appendix B.
    """

    unit: str
    units: int
    flop: float
    flop_full: float
