"""The one module that multiplies by weights."""

from __future__ import annotations

from functools import partial

import jax
from flax import linen as nn

from lmjax import sharding
from lmjax.layers.remat import named
from lmjax.ops.matmul import matmul, travelling_dtype
from lmjax.ops.quantize import parts_of, products_at
from lmjax.ops.spread import spread


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
      dtype: of the operands; accumulation is in float32.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    in_dims: int = 1
    use_bias: bool = True
    init_std: float = 0.02
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Shapes: [..., *in] -> [..., *features]."""
        shape = (*x.shape[-self.in_dims :], *self.features)
        normal = nn.initializers.normal(self.init_std)
        init = normal if self.kernel_init is None else self.kernel_init
        kernel = sharding.param(self, "kernel", init, shape, self.axes)
        product = partial(
            matmul,
            dtype=self.dtype,
            in_dims=self.in_dims,
            products=products_at((*self.path, "kernel")),
            parts=parts_of(self.axes, self.in_dims),
        )
        travelling = travelling_dtype(self.dtype)
        y = spread(product, x, kernel, self.axes, in_dims=self.in_dims, dtype=travelling)
        if self.use_bias:
            axes = tuple("norm" if a == "embed" else a for a in self.axes[self.in_dims :])
            bias = sharding.param(self, "bias", nn.initializers.zeros, self.features, axes)
            y += bias.astype(y.dtype)[(None,) * (y.ndim - bias.ndim)]
        return named(y, self.name) if self.name else y
