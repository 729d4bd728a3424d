"""Convolutions over images, and their transposes."""

# B batch, H height, W width, C channels in, F channels out.

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax import sharding
from lmjax.sharding import shard

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class Conv(nn.Module):
    """Cross-correlation with a square kernel, zeros around the image, and a bias where wanted.

    As torch's `Conv2d`: `padding` zeros stand on each side, so that a height H becomes
    floor((H + 2 padding - size) / stride) + 1.

    Args:
      features: channels out.
      size: height and width of the kernel.
      kernel_init: He et al., arXiv:1502.01852, equation 14 (variance 2 / fan out), where not given.
      split: whether `fsdp` splits the kernel's output channels, of which it then is a divisor.
      dtype: of the operands and of the result.
    """

    features: int
    size: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer | None = None
    split: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Shapes: [B, H, W, C] -> [B, H', W', F]."""
        kernel = _kernel(self, x_BHWC.shape[-1])
        y_BHWF = jax.lax.conv_general_dilated(
            x_BHWC.astype(self.dtype),
            kernel,
            window_strides=(self.stride, self.stride),
            padding=[(self.padding, self.padding)] * 2,
            dimension_numbers=_LAYOUT,
        )
        return _biased(self, y_BHWF)

    def flop(self, height: int, width: int, channels: int) -> float:
        """FLOP of one image of this size."""
        height, width = (self.out_size(n) for n in (height, width))
        return 2.0 * height * width * self.size**2 * channels * self.features

    def out_size(self, n: int) -> int:
        """The height (or width) that a height (or width) of `n` becomes."""
        return (n + 2 * self.padding - self.size) // self.stride + 1


class ConvTranspose(nn.Module):
    """The transpose of `Conv`'s map: an image grows by the stride.

    As torch's `ConvTranspose2d`: a height H becomes (H - 1) stride - 2 padding + size. The kernel
    is [size, size, C, F], and is not mirrored: torch's, whose axes are [C, F, size, size], is.
    Arguments are those of `Conv`.
    """

    features: int
    size: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer | None = None
    split: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Shapes: [B, H, W, C] -> [B, H', W', F]."""
        kernel = _kernel(self, x_BHWC.shape[-1])
        around = self.size - 1 - self.padding
        y_BHWF = jax.lax.conv_general_dilated(
            x_BHWC.astype(self.dtype),
            kernel,
            window_strides=(1, 1),
            padding=[(around, around)] * 2,
            lhs_dilation=(self.stride, self.stride),
            dimension_numbers=_LAYOUT,
        )
        return _biased(self, y_BHWF)

    def flop(self, height: int, width: int, channels: int) -> float:
        """FLOP of one image of this size, products with the zeros between pixels left out."""
        return 2.0 * height * width * self.size**2 * channels * self.features

    def out_size(self, n: int) -> int:
        """The height (or width) that a height (or width) of `n` becomes."""
        return (n - 1) * self.stride - 2 * self.padding + self.size


def max_pool(x_BHWC: jax.Array, *, size: int, stride: int, padding: int) -> jax.Array:
    """The largest of each window, as torch's `MaxPool2d`."""
    return nn.max_pool(x_BHWC, (size, size), (stride, stride), [(padding, padding)] * 2)


def _kernel(layer: Conv | ConvTranspose, channels: int) -> jax.Array:
    he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    init = he if layer.kernel_init is None else layer.kernel_init
    shape = (layer.size, layer.size, channels, layer.features)
    axes = (None, None, None, "embed" if layer.split else None)
    return sharding.param(layer, "kernel", init, shape, axes).astype(layer.dtype)


def _biased(layer: Conv | ConvTranspose, y_BHWF: jax.Array) -> jax.Array:
    if layer.use_bias:
        zeros = nn.initializers.zeros
        bias_F = sharding.param(layer, "bias", zeros, (layer.features,), ("norm",))
        y_BHWF += jnp.broadcast_to(bias_F.astype(y_BHWF.dtype), y_BHWF.shape)
    return shard(y_BHWF, "batch", None, None, None)
