"""Dropout."""

from __future__ import annotations

import jax
from flax import linen as nn

from lmjax.ops.dropout import dropout


class Dropout(nn.Module):
    """Zeroes elements at `rate`, scales the rest to keep the mean; does nothing outside training.

    Source: Srivastava et al., "Dropout", JMLR 15 (2014).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Shapes: any."""
        if not train or self.rate == 0:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))
