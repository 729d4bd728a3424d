"""Batch normalisation, whose statistics are the model's state."""

# C channels.

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax import sharding


class BatchNorm(nn.Module):
    """Normalises each channel by its mean and variance over the batch and the image.

    Source: Ioffe & Szegedy, arXiv:1502.03167, algorithms 1 and 2. Where rows are split over
    devices the statistics are of all of them. With microbatches they are of each by itself, so a
    batch that is cut differs from the whole one: see the paper, where the batch is what normalises.

    In training, the collection "batch_stats" follows the statistics as exponential averages: of
    the mean, and of the unbiased variance, n / (n - 1) of the one that normalises (as in
    algorithm 2, and torch). Evaluation normalises by the averages. Scale starts at 1, bias at 0.

    Args:
      momentum: what an average keeps of itself at each step; torch's `momentum` is 1 minus it.
      dtype: of the result; statistics are in float32.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Shapes: [..., C] -> [..., C]."""
        shape_C = x.shape[-1:]
        scale_C = sharding.param(self, "scale", self.scale_init, shape_C, ("norm",))
        bias_C = sharding.param(self, "bias", nn.initializers.zeros, shape_C, ("norm",))
        average_mean = self.variable("batch_stats", "mean", jnp.zeros, shape_C, jnp.float32)
        average_var = self.variable("batch_stats", "var", jnp.ones, shape_C, jnp.float32)
        x32 = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean_C = jnp.mean(x32, axes)
            var_C = jnp.mean(jnp.square(x32 - _last(mean_C, x.ndim)), axes)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased_C = var_C * (count / max(count - 1, 1))
                for average, now_C in ((average_mean, mean_C), (average_var, unbiased_C)):
                    kept = self.momentum * average.value
                    average.value = kept + (1 - self.momentum) * jax.lax.stop_gradient(now_C)
        else:
            mean_C, var_C = average_mean.value, average_var.value
        scale_C = scale_C * jax.lax.rsqrt(var_C + self.epsilon)
        y = (x32 - _last(mean_C, x.ndim)) * _last(scale_C, x.ndim) + _last(bias_C, x.ndim)
        return y.astype(self.dtype)


def _last(x_C: jax.Array, rank: int) -> jax.Array:
    """`x_C` as the last of `rank` axes."""
    return x_C.reshape((1,) * (rank - 1) + x_C.shape)
