"""DCGAN.

Source: Radford et al., "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", arXiv:1511.06434, section 3 and figure 1: no pooling, batch normalisation but
for the generator's output and the discriminator's input, ReLU in the one, leaky ReLU (0.2) in the
other, tanh at the end. Images lie between 0 and 1 outside of both networks, and -1 and 1 within.

Departure: an image of size `start` x 2^n has n layers that double it, the last of them with `width`
channels coming in, so that small images are made too; the paper's start with 4 x 4.

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

_normal = nn.initializers.normal(0.02)


def _scale(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return 1 + _normal(rng, shape, dtype)


def _doublings(size: int, start: int) -> int:
    """n of size = start x 2^n; raises UserError where there is none, or it is 0."""
    n = (size // start).bit_length() - 1
    if n < 1 or start * 2**n != size:
        near = [start * 2 ** max(1, n), start * 2 ** max(2, n + 1)]
        raise UserError(
            f"size is {size}, which {start} is not doubled to: give {near[0]} or {near[1]}, or "
            "another start."
        )
    return n


class DCGenerator(nn.Module):
    """Random numbers to images between 0 and 1: a `tasks.adversarial.Generator`."""

    size: int
    channels: int
    width: int
    latent_dim: int
    start: int = 4
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return (self.size, self.size, self.channels)

    def layers(self) -> list[tuple[str, ConvTranspose]]:
        """What doubles the image, in order, by name."""
        n = _doublings(self.size, self.start)
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
        return int(self.width * 2 ** (_doublings(self.size, self.start) - 1))

    @nn.compact
    def __call__(self, z_BZ: jax.Array, *, train: bool = False) -> jax.Array:
        """Shapes: [B, Z] -> [B, H, W, C], float32."""
        norm = partial(BatchNorm, scale_init=_scale, dtype=self.dtype)
        x_BF = Linear(
            features=(self.start, self.start, self.first),
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
        size, channels = self.start, self.first
        total = 2.0 * self.latent_dim * size**2 * channels
        for _, layer in self.layers():
            total += layer.flop(size, size, channels)
            size, channels = layer.out_size(size), layer.features
        return total


class DCDiscriminator(nn.Module):
    """Images to the log-odds that they are real: a `tasks.adversarial.Discriminator`."""

    size: int
    width: int
    start: int = 4
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
            for i in range(_doublings(self.size, self.start))
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
    start: int = 4,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> DCGenerator:
    """The paper's generator; 3,576,704 parameters with the numbers that stand here.

    Args:
      size: height and width of an image: `start`, doubled once or more often.
      channels: 3 for colours, 1 for grey.
      width: channels before the last layer; each layer before it has twice as many.
      latent_dim: random numbers for an image.
      start: height and width of the first image.
      dtype: of the products' operands; parameters are float32.
    """
    _check(size, start, channels=channels, width=width, latent_dim=latent_dim)
    return DCGenerator(
        size=size,
        channels=channels,
        width=width,
        latent_dim=latent_dim,
        start=start,
        dtype=dtype,
    )


def discriminator(
    *,
    size: int = 64,
    width: int = 64,
    start: int = 4,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> DCDiscriminator:
    """The paper's discriminator.

    Args:
      size: height and width of an image: `start`, doubled once or more often.
      width: channels after the first layer; each layer after it has twice as many.
      start: height and width of the last image.
      dtype: of the products' operands; parameters are float32.
    """
    _check(size, start, width=width)
    return DCDiscriminator(size=size, width=width, start=start, dtype=dtype)


def _check(size: int, start: int, **numbers: int) -> None:
    for name, value in {**numbers, "start": start}.items():
        if value < 1:
            raise UserError(f"{name} is {value}: must be at least 1.")
    _doublings(size, start)
