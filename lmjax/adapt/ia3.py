"""Learned factors of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from lmjax import sharding
from lmjax.adapt.adapted import Run
from lmjax.adapt.lora import check_some
from lmjax.adapt.sites import Site, leading, matches, named, replaced, slice_of
from lmjax.errors import UserError, did_you_mean
from lmjax.layers.linear import Linear, Part


@dataclass(frozen=True, kw_only=True)
class Ia3:
    """Each target's outputs, bias and all, times a vector; or its inputs. Vectors start at one.

    Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning", arXiv:2205.05638, section 3.3:
    keys, values, and what goes into the MLP's last product.

    Args:
      targets: which products, see `Lora`.
      inputs: those of the targets, as they are written there, whose inputs are multiplied.
      name: in the paths of its parameters.
    """

    targets: tuple[str, ...] = ("key", "value", "down")
    inputs: tuple[str, ...] = ("down",)
    name: str = "ia3"

    def __post_init__(self) -> None:
        check_some(self.name, self.targets)
        for target in self.inputs:
            if target not in self.targets:
                raise UserError(
                    f"{self.name}.inputs names {target!r}, which is no target."
                    + did_you_mean(target, self.targets)
                )

    def check(self, site: Site) -> None:
        """Raises UserError where inputs of a part are to be multiplied, which others have too."""
        if self.multiplies_inputs(site) and site.parts:
            raise UserError(
                f"{self.name}.inputs: {site.names()[0]} shares its inputs with other products: "
                "multiply its outputs."
            )

    def around(self, linear: Linear, site: Site, run: Run, x: jax.Array) -> jax.Array:
        """The product with its inputs or outputs multiplied."""
        inputs = self.multiplies_inputs(site)
        factors = _Factors(inputs, name=self.name)(site)
        if inputs:
            return run(x * leading(factors[0], x))
        y = run(x)
        new = [
            (part, old * leading(factor, old))
            for part, factor in zip(site.pieces, factors, strict=True)
            for old in [slice_of(y, site, part)]
        ]
        return replaced(y, site, new)

    def merged(
        self, kernel: jax.Array, bias: Any, params: Mapping[str, jax.Array], site: Site
    ) -> tuple[jax.Array, Any]:
        """Rows or columns of W, and the bias, times the vectors."""
        return self._multiplied(kernel, bias, dict(params), site)

    def unmerged(
        self, kernel: jax.Array, bias: Any, params: Mapping[str, jax.Array], site: Site
    ) -> tuple[jax.Array, Any]:
        """Divided by them: where one is zero, what it multiplied is gone, and is not a number."""
        return self._multiplied(kernel, bias, {k: 1 / x for k, x in params.items()}, site)

    def _multiplied(
        self, kernel: jax.Array, bias: Any, params: dict[str, jax.Array], site: Site
    ) -> tuple[jax.Array, Any]:
        if self.multiplies_inputs(site):
            factor = params["factor"]
            return kernel * factor.reshape(*factor.shape, *(1,) * len(site.features)), bias
        factors = [(part, params[named(part, "factor")]) for part in site.pieces]
        kernel = replaced(
            kernel, site, [(p, slice_of(kernel, site, p) * leading(f, kernel)) for p, f in factors]
        )
        if bias is not None:
            bias = replaced(bias, site, [(p, slice_of(bias, site, p) * f) for p, f in factors])
        return kernel, bias

    def multiplies_inputs(self, site: Site) -> bool:
        """Whether the vector of this product is over its inputs."""
        return any(matches(target, name) for target in self.inputs for name in site.names())


class _Factors(nn.Module):
    """The vector of each piece of a product, or of its inputs."""

    inputs: bool

    @nn.compact
    def __call__(self, site: Site) -> list[jax.Array]:
        def vector(part: Part | None) -> jax.Array:
            shape = site.in_shape if self.inputs else site.shape(part)
            axes = site.vector_axes(inputs=self.inputs)
            return sharding.param(self, named(part, "factor"), nn.initializers.ones, shape, axes)

        return [vector(part) for part in site.pieces]
