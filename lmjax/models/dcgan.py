"""DCGAN.

Source: Radford et al., "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", arXiv:1511.06434, section 3 and figure 1: no pooling, batch normalisation but
for the generator's output and the discriminator's input, ReLU in the one, leaky ReLU (0.2) in the
other, tanh at the end. Images lie between 0 and 1 outside of both networks, and -1 and 1 within.

Departure: an image of size 4 x 2^n has n layers that double it, the last of them with `width`
channels coming in, so that small images are made too.

| parameter | initialisation |
|---|---|
| kernels | normal, std 0.02 |
| norm scales, biases | normal around 1, std 0.02; 0 |
"""

# B batch, Z latent dimensions, H height, W width, C channels.

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.errors import UserError
from lmjax.layers.batch_norm import BatchNorm
from lmjax.layers.conv import Conv, ConvTranspose
from lmjax.layers.linear import Linear

START = 4  # height and width of the first image, in pixels
_normal = nn.initializers.normal(0.02)


def _scale(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return 1 + _normal(rng, shape, dtype)


def _doublings(size: int) -> int:
    """n of size = START x 2^n; raises UserError where there is none, or it is 0."""
    n = (size // START).bit_length() - 1
    if n < 1 or START * 2**n != size:
        near = [START * 2 ** max(1, n), START * 2 ** max(2, n + 1)]
        raise UserError(f"size is {size}: give 8, 16, 32, ..., as {near[0]} or {near[1]}.")
    return n


class DCGenerator(nn.Module):
    """Random numbers to images between 0 and 1: a `tasks.adversarial.Generator`."""

    size: int
    channels: int
    width: int
    latent_dim: int
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return (self.size, self.size, self.channels)

    def layers(self) -> list[tuple[str, ConvTranspose]]:
        """What doubles the image, in order, by name."""
        n = _doublings(self.size)
        found = []
        for i in range(n):
            last = i + 1 == n
            layer = ConvTranspose(
                self.channels if last else self.width * 2 ** (n - 2 - i),
                4,
                stride=2,
                padding=1,
                use_bias=last,
                split=not last,
                kernel_init=_normal,
                dtype=self.dtype,
                parent=None,
            )
            found.append((f"up{i + 1}", layer))
        return found

    @property
    def first(self) -> int:
        """Channels of the first image."""
        return int(self.width * 2 ** (_doublings(self.size) - 1))

    @nn.compact
    def __call__(self, z_BZ: jax.Array, *, train: bool = False) -> jax.Array:
        """Shapes: [B, Z] -> [B, H, W, C], float32."""
        norm = partial(BatchNorm, scale_init=_scale, dtype=self.dtype)
        x_BF = Linear(
            features=(START, START, self.first),
            axes=(None, None, None, "embed"),
            use_bias=False,
            kernel_init=_normal,
            dtype=self.dtype,
            name="start",
        )(z_BZ)
        x_BHWC = nn.relu(norm(name="start_norm")(x_BF, train=train))
        for name, layer in (layers := self.layers()):
            x_BHWC = layer.clone(name=name, parent=self)(x_BHWC)
            if name != layers[-1][0]:
                x_BHWC = nn.relu(norm(name=f"{name}_norm")(x_BHWC, train=train))
        return 0.5 + 0.5 * jnp.tanh(x_BHWC.astype(jnp.float32))

    def flop(self) -> float:
        """FLOP of making one image."""
        total, size, channels = 2.0 * self.latent_dim * START**2 * self.first, START, self.first
        for _, layer in self.layers():
            total += layer.flop(size, size, channels)
            size, channels = layer.out_size(size), layer.features
        return total


class DCDiscriminator(nn.Module):
    """Images to the log-odds that they are real: a `tasks.adversarial.Discriminator`."""

    size: int
    width: int
    dtype: str = "float32"

    def layers(self) -> list[tuple[str, Conv]]:
        """What halves the image, in order, by name."""
        return [
            (
                f"down{i + 1}",
                Conv(
                    self.width * 2**i,
                    4,
                    stride=2,
                    padding=1,
                    use_bias=i == 0,
                    kernel_init=_normal,
                    dtype=self.dtype,
                    parent=None,
                ),
            )
            for i in range(_doublings(self.size))
        ]

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Shapes: [B, H, W, C] -> [B], float32."""
        x_BHWC = 2 * x_BHWC - 1
        for i, (name, layer) in enumerate(self.layers()):
            x_BHWC = layer.clone(name=name, parent=self)(x_BHWC)
            if i:
                norm = BatchNorm(scale_init=_scale, dtype=self.dtype, name=f"{name}_norm")
                x_BHWC = norm(x_BHWC, train=train)
            x_BHWC = nn.leaky_relu(x_BHWC, 0.2)
        y_B1 = Linear(
            features=(1,),
            axes=(None, None, "embed", None),
            in_dims=3,
            kernel_init=_normal,
            dtype=self.dtype,
            name="output",
        )(x_BHWC)
        return y_B1[:, 0].astype(jnp.float32)

    def flop(self, shape: tuple[int, ...]) -> float:
        """FLOP of judging one image."""
        total, (size, _, channels) = 0.0, shape
        for _, layer in self.layers():
            total += layer.flop(size, size, channels)
            size, channels = layer.out_size(size), layer.features
        return total + 2.0 * size * size * channels


def generator(
    *,
    size: int = 64,
    channels: int = 3,
    width: int = 64,
    latent_dim: int = 100,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> DCGenerator:
    """The paper's generator; 3,576,704 parameters with the numbers that stand here.

    Args:
      size: height and width of an image: 8, 16, 32, ...
      channels: 3 for colours, 1 for grey.
      width: channels before the last layer; each layer before it has twice as many.
      latent_dim: random numbers for an image.
      dtype: of the products' operands; parameters are float32.
    """
    _check(size, channels=channels, width=width, latent_dim=latent_dim)
    return DCGenerator(
        size=size, channels=channels, width=width, latent_dim=latent_dim, dtype=dtype
    )


def discriminator(
    *,
    size: int = 64,
    width: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> DCDiscriminator:
    """The paper's discriminator.

    Args:
      size: height and width of an image: 8, 16, 32, ...
      width: channels after the first layer; each layer after it has twice as many.
      dtype: of the products' operands; parameters are float32.
    """
    _check(size, width=width)
    return DCDiscriminator(size=size, width=width, dtype=dtype)


def _check(size: int, **numbers: int) -> None:
    _doublings(size)
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is {value}: must be at least 1.")
