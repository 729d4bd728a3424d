"""The one module that multiplies by weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
from flax import linen as nn

from lmjax import sharding
from lmjax.layers.remat import named
from lmjax.ops.blockwise import Blocks
from lmjax.ops.matmul import matmul, travelling_dtype
from lmjax.ops.quantize import parts_of, products_at
from lmjax.ops.spread import spread


class Part(NamedTuple):
    """Columns of a kernel that joins several products: start..stop along an axis of `features`."""

    name: str
    axis: int
    start: int
    stop: int


def product(
    x: jax.Array,
    kernel: jax.Array | Blocks,
    axes: tuple[str | None, ...],
    *,
    in_dims: int = 1,
    dtype: str = "float32",
    path: Sequence[str] = (),
) -> jax.Array:
    """The contraction of the last `in_dims` axes of x with the first of the kernel, as `Linear`'s.

    Args:
      axes: names of the kernel's axes, inputs first.
      dtype: of the operands.
      path: of the kernel, by which `ops.quantize.products` chooses.
    """
    contract = partial(
        matmul,
        dtype=dtype,
        in_dims=in_dims,
        products=products_at(path),
        parts=parts_of(axes, in_dims),
    )
    travelling = travelling_dtype(dtype)
    return spread(contract, x, kernel, axes, in_dims=in_dims, dtype=travelling)


class Linear(nn.Module):
    """y = x W + b over the last `in_dims` axes of x, which become the axes `features`.

    Within `ops.quantize.products` x W has 8-bit operands. Remat policies know y by the module's
    name.

    Args:
      features: sizes of the output axes.
      axes: names of the kernel's axes, inputs first.
      in_dims: how many axes of x are contracted.
      init_std: standard deviation of the normal initialisation; biases start at zero.
      kernel_init: in the place of that.
      parts: what the columns are, where they are several products in one kernel: they make up an
        axis of `features`, in its order. Nothing here reads them; `lmjax.adapt` tunes each.
      dtype: of the operands; accumulation is in float32.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    in_dims: int = 1
    use_bias: bool = True
    init_std: float = 0.02
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer | None = None
    parts: tuple[Part, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Shapes: [..., *in] -> [..., *features]."""
        y = product(
            x,
            self.declare_kernel(x.shape[-self.in_dims :]),
            self.axes,
            in_dims=self.in_dims,
            dtype=self.dtype,
            path=(*self.path, "kernel"),
        )
        if self.use_bias:
            axes = tuple("norm" if a == "embed" else a for a in self.axes[self.in_dims :])
            bias = sharding.param(self, "bias", nn.initializers.zeros, self.features, axes)
            y += bias.astype(y.dtype)[(None,) * (y.ndim - bias.ndim)]
        return named(y, self.name) if self.name else y

    def declare_kernel(self, in_shape: tuple[int, ...]) -> jax.Array | Blocks:
        """The parameter that x is multiplied by; `adapt.quantized` puts another in its place."""
        init, shape = self.drawn(), (*in_shape, *self.features)
        kernel: jax.Array = sharding.param(self, "kernel", init, shape, self.axes)
        return kernel

    def drawn(self) -> nn.initializers.Initializer:
        """What the kernel is initialised with."""
        normal = nn.initializers.normal(self.init_std)
        return normal if self.kernel_init is None else self.kernel_init
