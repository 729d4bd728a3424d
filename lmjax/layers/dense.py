"""Fully connected layers with a nonlinearity, by name."""

# B batch, F inputs, H units.

from __future__ import annotations

import jax
from flax import linen as nn

from lmjax.layers.linear import Linear
from lmjax.ops.activations import Activation, activation, swiglu
from lmjax.ops.initializers import Init, initializer
from lmjax.sharding import shard


class Dense(nn.Module):
    """f(x W + b), or, of the activation "swiglu", silu(x W1 + b1) * (x W2 + b2).

    Source: swiglu is Shazeer, arXiv:2002.05202, equation 6, with biases. Biases start at zero.

    Args:
      units: how many outputs there are.
      axes: names of the kernel's axes.
      activation: f.
      kernel_init: of the kernels, by name, see `ops.initializers`.
      init_std: of those of its kinds that have one.
      dtype: of the products' operands.
    """

    units: int
    axes: tuple[str | None, str | None]
    activation: Activation = "relu"
    kernel_init: Init = "he_uniform"
    init_std: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BF: jax.Array) -> jax.Array:
        """Shapes: [B, F] -> [B, H]."""
        gated = self.activation == "swiglu"
        h_BH = self._product("gate" if gated else "dense", x_BF)
        if gated:
            return swiglu(h_BH, self._product("up", x_BF), dtype=self.dtype)
        return activation(self.activation)(h_BH)

    def _product(self, name: str, x_BF: jax.Array) -> jax.Array:
        h_BH = Linear(
            features=(self.units,),
            axes=self.axes,
            kernel_init=initializer(self.kernel_init, std=self.init_std),
            dtype=self.dtype,
            name=name,
        )(x_BF)
        return shard(h_BH, "batch", "act_mlp" if self.axes[1] == "mlp" else "act_embed")

    def flop(self, inputs: int) -> float:
        """FLOP of one example's forward pass."""
        return (4.0 if self.activation == "swiglu" else 2.0) * inputs * self.units
