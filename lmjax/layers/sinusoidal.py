"""Position embeddings that are computed, not learned."""

# B batch, T length, D embed

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.ops.matmul import activation_dtype


class SinusoidalPositions(nn.Module):
    """sin and cos of the position at D / 2 wavelengths from 2 pi to 10000 * 2 pi; no parameters.

    Source: Vaswani et al., arXiv:1706.03762, section 3.5: element 2 i is sin(p / 10000^(2 i / D)),
    element 2 i + 1 the cosine of the same. D is even.
    """

    dim: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        """Shapes: [B, T] -> [B, T, D]."""
        exponents_F = jnp.arange(0, self.dim, 2, dtype=jnp.float32) * (-math.log(10000) / self.dim)
        angles_BTF = positions_BT.astype(jnp.float32)[..., None] * jnp.exp(exponents_F)[None, None]
        pairs_BTF2 = jnp.stack([jnp.sin(angles_BTF), jnp.cos(angles_BTF)], axis=-1)
        x_BTD = pairs_BTF2.reshape((*positions_BT.shape, self.dim))
        return x_BTD.astype(activation_dtype(self.dtype))
