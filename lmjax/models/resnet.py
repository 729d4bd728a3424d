"""ResNet.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 1.

Departures:
  - A bottleneck that halves the image has its stride in the 3 x 3 convolution, as torchvision has
    it ("ResNet v1.5"), whose parameters and outputs these are.
  - `stem="small"`, for images below some 64 pixels, begins with one 3 x 3 convolution of stride 1
    in the place of the 7 x 7 one of stride 2 and its pooling (section 4.2 does so for CIFAR-10).

| parameter | initialisation |
|---|---|
| convolutions | normal, variance 2 / fan out |
| scales, biases of norms | 1, 0 |
| output layer's kernel, bias | uniform within 1/sqrt(fan in); 0 |
"""

# B batch, H height, W width, C channels, N classes.

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.core import Batch, Dataset, NetworkOutput, Spec
from lmjax.errors import UserError, did_you_mean
from lmjax.layers.batch_norm import BatchNorm
from lmjax.layers.conv import Conv, max_pool
from lmjax.layers.linear import Linear

# depth: (blocks of each of the four stages, whether they are bottlenecks)
RESNET_SIZES = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}
Stem = Literal["imagenet", "small"]


class ResidualBlock(nn.Module):
    """relu(x + f(x)), f two 3 x 3 convolutions, or a 1 x 1, a 3 x 3 and a 1 x 1 (bottleneck).

    Where the shape changes, x goes through a 1 x 1 convolution of its own.
    """

    width: int
    stride: int
    bottleneck: bool
    dtype: str = "float32"

    @property
    def features(self) -> int:
        """Channels out."""
        return 4 * self.width if self.bottleneck else self.width

    def convolutions(self) -> list[tuple[str, Conv]]:
        """The branch f, in order, by name."""
        conv = partial(Conv, dtype=self.dtype, parent=None)
        if self.bottleneck:
            found = [
                conv(self.width, 1),
                conv(self.width, 3, stride=self.stride, padding=1),
                conv(self.features, 1),
            ]
        else:
            found = [
                conv(self.width, 3, stride=self.stride, padding=1),
                conv(self.width, 3, padding=1),
            ]
        return [(f"conv{i + 1}", each) for i, each in enumerate(found)]

    def shortcut(self, channels: int) -> Conv | None:
        """What x goes through; None where it stays as it is."""
        if self.stride == 1 and channels == self.features:
            return None
        return Conv(self.features, 1, stride=self.stride, dtype=self.dtype, parent=None)

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Shapes: [B, H, W, C] -> [B, H / stride, W / stride, features]."""
        y_BHWC = x_BHWC
        convolutions = self.convolutions()
        for i, (name, conv) in enumerate(convolutions):
            y_BHWC = conv.clone(name=name, parent=self)(y_BHWC)
            y_BHWC = BatchNorm(dtype=self.dtype, name=f"norm{i + 1}")(y_BHWC, train=train)
            if i + 1 < len(convolutions):
                y_BHWC = nn.relu(y_BHWC)
        if (shortcut := self.shortcut(x_BHWC.shape[-1])) is not None:
            x_BHWC = shortcut.clone(name="shortcut_conv", parent=self)(x_BHWC)
            x_BHWC = BatchNorm(dtype=self.dtype, name="shortcut_norm")(x_BHWC, train=train)
        return nn.relu(x_BHWC + y_BHWC)

    def flop(self, height: int, width: int, channels: int) -> tuple[float, int, int]:
        """(FLOP of one image, the height and the width that come out)."""
        total, h, w, c = 0.0, height, width, channels
        for _, conv in self.convolutions():
            total += conv.flop(h, w, c)
            h, w, c = conv.out_size(h), conv.out_size(w), conv.features
        if (shortcut := self.shortcut(channels)) is not None:
            total += shortcut.flop(height, width, channels)
        return total, h, w


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over the image, an output layer.

    A `core.Network` of `images`, float32 [H, W, C].
    """

    num_outputs: int
    blocks: Sequence[int]
    bottleneck: bool
    width: int = 64
    stem: Stem = "imagenet"
    dtype: str = "float32"

    def residual_blocks(self) -> list[tuple[str, ResidualBlock]]:
        """All blocks in order, by name."""
        found = []
        for stage, number in enumerate(self.blocks):
            for i in range(number):
                block = ResidualBlock(
                    width=self.width * 2**stage,
                    stride=2 if stage and not i else 1,
                    bottleneck=self.bottleneck,
                    dtype=self.dtype,
                    parent=None,
                )
                found.append((f"stage{stage + 1}_block{i + 1}", block))
        return found

    def first(self) -> Conv:
        """The stem's convolution."""
        conv = partial(Conv, self.width, dtype=self.dtype, parent=None)
        return conv(3, padding=1) if self.stem == "small" else conv(7, stride=2, padding=3)

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> NetworkOutput:
        """The class scores of every image."""
        x_BHWC = self.features(batch["images"], train=train)
        x_BC = jnp.mean(x_BHWC.astype(jnp.float32), (1, 2))
        values_BN = Linear(
            features=(self.num_outputs,),
            axes=("embed", None),
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=self.dtype,
            name="output",
        )(x_BC)
        return NetworkOutput(values_BN.astype(jnp.float32))

    def features(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """What the last block makes of images."""
        x_BHWC = self.first().clone(name="stem_conv", parent=self)(x_BHWC)
        x_BHWC = nn.relu(BatchNorm(dtype=self.dtype, name="stem_norm")(x_BHWC, train=train))
        if self.stem == "imagenet":
            x_BHWC = max_pool(x_BHWC, size=3, stride=2, padding=1)
        for name, block in self.residual_blocks():
            x_BHWC = block.clone(name=name, parent=self)(x_BHWC, train=train)
        return x_BHWC

    def check(self, data: Dataset) -> None:
        """Raises UserError where the data has no images."""
        if "images" not in data.example:
            raise UserError(
                f"the data has no images: it has {', '.join(data.example)}. Use data of images, as "
                "lmjax.data.images.Images."
            )

    def flop(self, example: Spec) -> float:
        """FLOP of the forward pass of one image: convolutions and the output layer."""
        h, w, c = example["images"].shape
        first = self.first()
        total = first.flop(h, w, c)
        h, w, c = first.out_size(h), first.out_size(w), first.features
        if self.stem == "imagenet":
            h, w = (-(-n // 2) for n in (h, w))
        for _, block in self.residual_blocks():
            more, h, w = block.flop(h, w, c)
            total, c = total + more, block.features
        return total + 2.0 * c * self.num_outputs

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; the blocks of a stage together."""
        counts: dict[str, int] = {}
        for name, part in params.items():
            key = name.split("_")[0]
            counts[key] = counts.get(key, 0) + sum(x.size for x in jax.tree.leaves(part))
        return counts


def resnet(
    *,
    depth: int = 18,
    blocks: Sequence[int] | None = None,
    bottleneck: bool | None = None,
    num_classes: int = 1000,
    width: int = 64,
    stem: Stem = "imagenet",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> ResNet:
    """ResNet 18 (11,689,512 parameters with 1000 classes), 34, 50 (25,557,032), 101 (44,549,160).

    Args:
      depth: one of `RESNET_SIZES`.
      blocks: of each stage, in the place of the preset's.
      bottleneck: likewise.
      width: channels of the first stage; each further one has twice as many.
      stem: "imagenet", or "small" for small images.
      dtype: of the products' operands; parameters are float32.

    Raises UserError for an unknown depth, and for numbers that make no model.
    """
    if depth not in RESNET_SIZES:
        raise UserError(f"depth is {depth}: give one of {', '.join(map(str, RESNET_SIZES))}.")
    own_blocks, own_bottleneck = RESNET_SIZES[depth]
    blocks = own_blocks if blocks is None else tuple(blocks)
    if stem not in ("imagenet", "small"):
        raise UserError(f"stem is {stem!r}." + did_you_mean(str(stem), ("imagenet", "small")))
    if not blocks or min(*blocks, num_classes, width, math.inf) < 1:
        raise UserError(
            f"blocks {list(blocks)}, num_classes {num_classes}, width {width}: give at least one "
            "stage, and at least 1 of each."
        )
    return ResNet(
        num_outputs=num_classes,
        blocks=blocks,
        bottleneck=own_bottleneck if bottleneck is None else bottleneck,
        width=width,
        stem=stem,
        dtype=dtype,
    )
