"""Low-rank adaptation: W + s A B."""

# r rank; a product's inputs and outputs may be several axes.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lmjax import sharding
from lmjax.adapt.adapted import Run
from lmjax.adapt.sites import Site, leading, named, replaced, slice_of
from lmjax.errors import UserError, did_you_mean
from lmjax.layers.dropout import Dropout
from lmjax.layers.linear import Linear, Part, product

Scaling = Literal["lora", "rslora"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """x W + s drop(x) A B, of which A and B train; B starts at zero, and so does the change.

    Source: Hu et al., "LoRA", arXiv:2106.09685, equation 3; its scale alpha / r, or alpha / sqrt(r)
    of rsLoRA: Kalajdzievski, arXiv:2312.03732, equation 6. A starts uniform within 1 / sqrt(inputs)
    as in the released code, not normal. Of a kernel that joins several products each has its own
    A and B, so that all are what they would be apart.

    With `dora` the columns of W + s A B are divided by their norms (a constant to the gradient) and
    multiplied by magnitudes that train (Liu et al., "DoRA", arXiv:2402.09353, equations 5 and 11).
    The parameter is a magnitude's distance from the norm of W's column, so that any W may be loaded
    under it; the product x W has no dropout.

    Args:
      targets: which products: "query", "value", "mlp/up", "*" (`sites.matches`).
      rank: r.
      alpha: of the scale.
      dropout: rate on x before A.
      scaling: "lora" or "rslora".
      dora: see above.
      name: in the paths of its parameters.
    """

    targets: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: Scaling = "lora"
    dora: bool = False
    name: str = "lora"

    def __post_init__(self) -> None:
        check_low_rank(self.name, self.rank, self.dropout, self.targets)
        if not 0 < self.alpha < math.inf:
            raise UserError(f"{self.name}.alpha is {self.alpha}: must be positive and finite.")
        if self.scaling not in ("lora", "rslora"):
            kinds = ("lora", "rslora")
            raise UserError(
                f"{self.name}.scaling is {self.scaling!r}." + did_you_mean(str(self.scaling), kinds)
            )

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    def check(self, site: Site) -> None:
        """Raises UserError where the rank is above the rank of the kernel."""
        check_rank(self.name, self.rank, site)

    def around(self, linear: Linear, site: Site, run: Run, x: jax.Array) -> jax.Array:
        """The product with what A and B add to it."""
        y = run(x)
        factors = _LowRank(self.rank, self.dora, name=self.name)(site)
        dropped = dropped_out(linear, self.dropout, x, self.name)
        new = []
        for part, (a, b, magnitude) in zip(site.pieces, factors, strict=True):
            old = slice_of(y, site, part)
            added = self.scale * low_rank(dropped, a, b, site)
            if magnitude is not None:
                kernel = slice_of(_variable(linear, "kernel"), site, part)
                factor = leading(self._factor(kernel, a, b, magnitude, site), y)
                bias = jnp.zeros((1,) * y.ndim, y.dtype)
                if linear.use_bias:
                    bias = leading(slice_of(_variable(linear, "bias"), site, part), y)
                new.append((part, (old - bias) * factor + bias + factor * added.astype(y.dtype)))
            else:
                new.append((part, old + added.astype(y.dtype)))
        return replaced(y, site, new)

    def _factor(
        self, kernel: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array, site: Site
    ) -> jax.Array:
        """Magnitudes over norms of the columns of W + s A B."""
        kernel = kernel.astype(jnp.float32)
        before = _norms(lax.stop_gradient(kernel), site.in_dims)
        changed = kernel + self.scale * jnp.tensordot(a, b, axes=1)
        return (before + magnitude) / lax.stop_gradient(_norms(changed, site.in_dims))

    def merged(
        self, kernel: jax.Array, bias: Any, params: Mapping[str, jax.Array], site: Site
    ) -> tuple[jax.Array, Any]:
        """W + s A B; with `dora` its columns at their magnitudes."""
        new = []
        for part in site.pieces:
            a, b = params[named(part, "a")], params[named(part, "b")]
            old = slice_of(kernel, site, part)
            changed = old + self.scale * jnp.tensordot(a, b, axes=1)
            if self.dora:
                magnitude = params[named(part, "magnitude")]
                changed *= leading(self._factor(old, a, b, magnitude, site), changed)
            new.append((part, changed))
        return replaced(kernel, site, new), bias

    def unmerged(
        self, kernel: jax.Array, bias: Any, params: Mapping[str, jax.Array], site: Site
    ) -> tuple[jax.Array, Any]:
        """W; raises UserError with `dora`, whose magnitudes stand for norms that are gone."""
        if self.dora:
            raise UserError(
                "DoRA cannot be unmerged: the norms of the columns of the base are not in what was "
                "merged. Keep the base."
            )
        new = []
        for part in site.pieces:
            a, b = params[named(part, "a")], params[named(part, "b")]
            delta = self.scale * jnp.tensordot(a, b, axes=1)
            new.append((part, slice_of(kernel, site, part) - delta))
        return replaced(kernel, site, new), bias


class _LowRank(nn.Module):
    """A, B and, of DoRA, the magnitudes of each piece of a product."""

    rank: int
    dora: bool

    @nn.compact
    def __call__(self, site: Site) -> list[tuple[jax.Array, jax.Array, jax.Array | None]]:
        return [self._piece(site, part) for part in site.pieces]

    def _piece(
        self, site: Site, part: Part | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        def zeros(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
            return sharding.param(self, named(part, name), nn.initializers.zeros, shape, axes)

        a = factor_in(self, site, part, self.rank, uniform)
        outs = site.axes[site.in_dims :]
        b = zeros("b", (self.rank, *site.shape(part)), (None, *outs))
        if not self.dora:
            return a, b, None
        return a, b, zeros("magnitude", site.shape(part), site.vector_axes())


def factor_in(module: nn.Module, site: Site, part: Part | None, rank: int, init: Any) -> jax.Array:
    """The parameter A [*in, rank] of a piece, split as the kernel's inputs are."""
    shape, axes = (*site.in_shape, rank), (*site.axes[: site.in_dims], None)
    return sharding.param(module, named(part, "a"), init, shape, axes)


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform within 1 / sqrt(inputs): Kaiming's with a slope of sqrt(5)."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, site: Site) -> jax.Array:
    """x A B, as the product with the kernel is split."""
    ins, outs = site.axes[: site.in_dims], site.axes[site.in_dims :]
    path = (*site.path, "adapter")
    h = product(x, a, (*ins, None), in_dims=site.in_dims, dtype=site.dtype, path=path)
    return product(h, b, (None, *outs), dtype=site.dtype, path=path)


def dropped_out(linear: Linear, rate: float, x: jax.Array, name: str) -> jax.Array:
    """`x` with dropout where the model trains: where it was given a key for it."""
    if not rate or not linear.has_rng("dropout"):
        return x
    return Dropout(rate, name=f"{name}_dropout")(x, train=True)


def check_low_rank(name: str, rank: int, dropout: float, targets: tuple[str, ...]) -> None:
    """Raises UserError for numbers that no product could have."""
    if rank < 1:
        raise UserError(f"{name}.rank is {rank}: must be at least 1.")
    if not 0 <= dropout < 1:
        raise UserError(f"{name}.dropout is {dropout}: must be at least 0 and below 1.")
    check_some(name, targets)


def check_some(name: str, targets: tuple[str, ...]) -> None:
    """Raises UserError where no product is named."""
    if not targets or isinstance(targets, str):
        raise UserError(f"{name}.targets is {targets!r}: give names, as ('query', 'value').")


def check_rank(name: str, rank: int, site: Site) -> None:
    """Raises UserError where the rank is above what a piece can have."""
    for part, called in zip(site.pieces, site.names(), strict=True):
        ins, outs = math.prod(site.in_shape), math.prod(site.shape(part))
        if rank > min(ins, outs):
            raise UserError(
                f"{name}.rank is {rank}, and {called} is {ins} x {outs}: it has a rank of at most "
                f"{min(ins, outs)}. Lower the rank, or leave it out of targets."
            )


def _norms(kernel: jax.Array, in_dims: int) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(in_dims))))


def _variable(linear: Linear, name: str) -> jax.Array:
    """A parameter of the module that is being called."""
    value: Any = linear.get_variable("params", name)
    return sharding.unbox(value)
