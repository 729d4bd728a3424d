"""Normalisation layers."""

from __future__ import annotations

import jax
from flax import linen as nn

from lmjax import sharding
from lmjax.ops.norm import layer_norm, rms_norm


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in float32.

    Source: Ba et al., "Layer Normalization", arXiv:1607.06450, equation 4. Scale starts at 1,
    bias at 0.
    """

    epsilon: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Shapes: [B, T, D] -> [B, T, D]."""
        dim = x_BTD.shape[-1:]
        scale = sharding.param(self, "scale", nn.initializers.ones, dim, ("norm",))
        bias = sharding.param(self, "bias", nn.initializers.zeros, dim, ("norm",))
        return layer_norm(x_BTD, scale, bias, epsilon=self.epsilon, dtype=self.dtype)


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis, statistics in float32, then a scale.

    Source: Zhang & Sennrich, arXiv:1910.07467, equation 4. The scale starts at 1.

    Args:
      offset: what the scale has beside the parameter, which is then its distance from that: 1 in
        Gemma, where decay so pulls scales to 1.
    """

    epsilon: float = 1e-5
    dtype: str = "float32"
    offset: float = 0.0

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Shapes: [..., D] -> [..., D]."""
        init = nn.initializers.constant(1.0 - self.offset)
        scale = sharding.param(self, "scale", init, x_BTD.shape[-1:], ("norm",))
        return rms_norm(x_BTD, self.offset + scale, epsilon=self.epsilon, dtype=self.dtype)
