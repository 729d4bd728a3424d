"""Low-rank adaptation in the form of a singular value decomposition, whose ranks training chooses.

The model's half: the product. What prunes ranks is a half of the optimizer, see `allocation`.
"""

# r rank

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax import sharding
from lmjax.adapt.adapted import Run
from lmjax.adapt.lora import check_low_rank, check_rank, dropped_out, factor_in, low_rank
from lmjax.adapt.sites import Site, named, replaced, slice_of
from lmjax.errors import UserError
from lmjax.layers.linear import Linear

Triplet = tuple[jax.Array, jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class AdaLora:
    """x W + s drop(x) A diag(values) B; A and B start normal, the values at zero.

    Source: Zhang et al., "AdaLoRA", arXiv:2303.10512, equation 3, with A for its Q and B for its P
    (a kernel here is its transpose). Wrap the optimizer in `allocation.adalora`, which prunes
    values; without it this is a LoRA with values.

    Args:
      targets: which products, see `Lora`.
      rank: r at the start.
      alpha: s is alpha / (r + 1e-5), as in PEFT; None for s = 1, as in the paper.
      dropout: rate on x before A.
      name: in the paths of its parameters.
    """

    targets: tuple[str, ...]
    rank: int = 12
    alpha: float | None = None
    dropout: float = 0.0
    name: str = "adalora"

    def __post_init__(self) -> None:
        check_low_rank(self.name, self.rank, self.dropout, self.targets)
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"{self.name}.alpha is {self.alpha}: must be positive, or None.")

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / (self.rank + 1e-5)

    def check(self, site: Site) -> None:
        """Raises UserError where the rank is above the rank of the kernel."""
        check_rank(self.name, self.rank, site)

    def around(self, linear: Linear, site: Site, run: Run, x: jax.Array) -> jax.Array:
        """The product with what the triplets add to it."""
        y = run(x)
        triplets = _Triplets(self.rank, name=self.name)(site)
        dropped = dropped_out(linear, self.dropout, x, self.name)
        new = []
        for part, (a, values, b) in zip(site.pieces, triplets, strict=True):
            scaled = a * values[(None,) * (a.ndim - 1)]
            added = self.scale * low_rank(dropped, scaled, b, site)
            new.append((part, slice_of(y, site, part) + added.astype(y.dtype)))
        return replaced(y, site, new)

    def merged(
        self, kernel: jax.Array, bias: Any, params: Mapping[str, jax.Array], site: Site
    ) -> tuple[jax.Array, Any]:
        """W + s A diag(values) B."""
        return self._moved(kernel, params, site, 1.0), bias

    def unmerged(
        self, kernel: jax.Array, bias: Any, params: Mapping[str, jax.Array], site: Site
    ) -> tuple[jax.Array, Any]:
        """W."""
        return self._moved(kernel, params, site, -1.0), bias

    def _moved(
        self, kernel: jax.Array, params: Mapping[str, jax.Array], site: Site, sign: float
    ) -> jax.Array:
        new = []
        for part in site.pieces:
            a, values, b = (params[named(part, name)] for name in ("a", "values", "b"))
            delta = jnp.tensordot(a * values[(None,) * (a.ndim - 1)], b, axes=1)
            new.append((part, slice_of(kernel, site, part) + sign * self.scale * delta))
        return replaced(kernel, site, new)


class _Triplets(nn.Module):
    """A, the values and B of each piece of a product."""

    rank: int

    @nn.compact
    def __call__(self, site: Site) -> list[Triplet]:
        normal = nn.initializers.normal(0.02)
        found = []
        for part in site.pieces:
            a = factor_in(self, site, part, self.rank, normal)
            zeros = nn.initializers.zeros
            values = sharding.param(self, named(part, "values"), zeros, (self.rank,), (None,))
            shape, axes = (self.rank, *site.shape(part)), (None, *site.axes[site.in_dims :])
            b = sharding.param(self, named(part, "b"), normal, shape, axes)
            found.append((a, values, b))
        return found
