"""Bottleneck adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
from flax import linen as nn

from lmjax import sharding
from lmjax.adapt.adapted import Run
from lmjax.adapt.lora import check_some
from lmjax.adapt.sites import Site
from lmjax.errors import UserError
from lmjax.layers.linear import Linear, product
from lmjax.ops.activations import gelu


@dataclass(frozen=True, kw_only=True)
class Houlsby:
    """y + gelu(y D + d) U + u of a product's result y, before it is added to the residual stream.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751,
    section 2.1 and figure 2: after the output of attention and after the MLP. U starts at zero, so
    that the model starts as it was (the paper draws it nearly so); GELU in its tanh form is the
    nonlinearity of the released code. The paper trains the norms too: name them in `trainable`.

    Args:
      targets: which products, see `Lora`; their result has one axis.
      hidden: units of the bottleneck.
      name: in the paths of its parameters.
    """

    targets: tuple[str, ...] = ("attention/out", "down")
    hidden: int = 64
    name: str = "houlsby"

    def __post_init__(self) -> None:
        check_some(self.name, self.targets)
        if self.hidden < 1:
            raise UserError(f"{self.name}.hidden is {self.hidden}: must be at least 1.")

    def check(self, site: Site) -> None:
        """Raises UserError where the product's result has several axes: heads."""
        if len(site.features) != 1 or site.parts:
            raise UserError(
                f"{self.name}.targets names {site.names()[0]}, whose result is split into heads: "
                "name products whose result goes into the residual stream."
            )
        if self.hidden > site.features[0]:
            raise UserError(
                f"{self.name}.hidden is {self.hidden}, and {site.names()[0]} gives "
                f"{site.features[0]} numbers: a bottleneck is narrower."
            )

    def around(self, linear: Linear, site: Site, run: Run, x: jax.Array) -> jax.Array:
        """The result, and what the bottleneck makes of it."""
        y = run(x)
        down, down_bias, up, up_bias = _Bottleneck(self.hidden, name=self.name)(site)
        (axis,), path = site.axes[site.in_dims :], (*site.path, "adapter")

        def biased(h: jax.Array, bias: jax.Array) -> jax.Array:
            return h + bias.astype(h.dtype)[(None,) * (h.ndim - 1)]

        h = biased(product(y, down, (axis, None), dtype=site.dtype, path=path), down_bias)
        h = gelu(h, dtype=site.dtype)
        added = biased(product(h, up, (None, axis), dtype=site.dtype, path=path), up_bias)
        return y + added.astype(y.dtype)

    def merged(self, kernel: Any, bias: Any, params: Mapping[str, Any], site: Site) -> NoReturn:
        """Raises UserError: a nonlinearity is no part of a kernel."""
        raise UserError(
            f"{self.name} cannot be merged: what it adds is no linear function. Keep the adapter."
        )

    unmerged = merged


class _Bottleneck(nn.Module):
    """The parameters: down [D, h], its bias, up [h, D], its bias."""

    hidden: int

    @nn.compact
    def __call__(self, site: Site) -> tuple[jax.Array, ...]:
        (dim,), (axis,) = site.features, site.axes[site.in_dims :]
        init = nn.initializers.normal(1 / math.sqrt(dim))
        zeros = nn.initializers.zeros
        return (
            sharding.param(self, "down", init, (dim, self.hidden), (axis, None)),
            sharding.param(self, "down_bias", zeros, (self.hidden,), (None,)),
            sharding.param(self, "up", zeros, (self.hidden, dim), (None, axis)),
            sharding.param(self, "up_bias", zeros, (dim,), site.vector_axes()),
        )
