"""The one module that multiplies by weights."""

from __future__ import annotations

import jax
from flax import linen as nn

from lmjax import sharding
from lmjax.ops.matmul import matmul


class Linear(nn.Module):
    """y = x W + b over the last `in_dims` axes of x, which become the axes `features`.

    Args:
      features: sizes of the output axes.
      axes: names of the kernel's axes, inputs first.
      in_dims: how many axes of x are contracted.
      init_std: standard deviation of the normal initialisation; biases start at zero.
      dtype: of the operands; accumulation is in float32 and the weights are kept in float32.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    in_dims: int = 1
    use_bias: bool = True
    init_std: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Shapes: [..., *in] -> [..., *features]."""
        shape = (*x.shape[-self.in_dims :], *self.features)
        kernel = sharding.param(
            self, "kernel", nn.initializers.normal(self.init_std), shape, self.axes
        )
        y = matmul(x, kernel, dtype=self.dtype, in_dims=self.in_dims)
        if self.use_bias:
            axes = tuple("norm" if a == "embed" else a for a in self.axes[self.in_dims :])
            bias = sharding.param(self, "bias", nn.initializers.zeros, self.features, axes)
            y += bias.astype(y.dtype)[(None,) * (y.ndim - bias.ndim)]
        return y
