"""Augmentation of images with numpy: crop, flip, colour, cutout.

Every function is pure in (image, seed, index). Images are float32 in [0, 1] or uint8, [H, W, C]: H
height, W width, C channels (the first three red, green and blue); the dtype is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmjax.data.augment.draws import generator
from lmjax.errors import UserError

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A window of the image, after padding it with zeros on every side.

    Source: with a padding of 4, He et al., arXiv:1512.03385, section 4.2.
    """

    height: int
    width: int
    padding: int = 0

    def __call__(self, image_HWC: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The window of example `index`, [height, width, C]."""
        rows = image_HWC.shape[0] + 2 * self.padding - self.height
        columns = image_HWC.shape[1] + 2 * self.padding - self.width
        if rows < 0 or columns < 0:
            raise UserError(
                f"an image of {image_HWC.shape[:2]} padded by {self.padding} holds no crop of "
                f"{(self.height, self.width)}: give a smaller one, or more padding."
            )
        random = generator(seed, index, name="crop")
        top, left = int(random.integers(rows + 1)), int(random.integers(columns + 1))
        pad = (self.padding, self.padding)
        padded = np.pad(image_HWC, (pad, pad, (0, 0)))
        return padded[top : top + self.height, left : left + self.width]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirrors left and right, with a probability."""

    rate: float = 0.5

    def __call__(self, image_HWC: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The image of example `index`, or its mirror image."""
        flip = generator(seed, index, name="flip").random() < self.rate
        return image_HWC[:, ::-1] if flip else image_HWC


@dataclass(frozen=True, kw_only=True)
class ColourJitter:
    """Changes brightness, contrast and saturation, in this order.

    Source: Howard, arXiv:1312.5402, section 2, as in torchvision: each factor is uniform in
    [max(0, 1 - x), 1 + x]; brightness is a product; contrast moves from the mean of the grey image,
    saturation from the grey image itself. Departure: the order is fixed.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4

    def __call__(self, image_HWC: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The image of example `index` in other colours; [H, W, 3]."""
        random = generator(seed, index, name="colour")
        brightness, contrast, saturation = (
            np.float32(random.uniform(max(0.0, 1 - x), 1 + x))
            for x in (self.brightness, self.contrast, self.saturation)
        )
        whole = np.float32(255 if image_HWC.dtype == np.uint8 else 1)
        image = np.clip(image_HWC.astype(np.float32) / whole * brightness, 0, 1)
        image = _blend(image, np.float32((image @ _GREY).mean()), contrast)
        image = _blend(image, (image @ _GREY)[..., None], saturation)
        if image_HWC.dtype == np.uint8:
            return np.asarray(np.rint(image * whole), np.uint8)
        return image.astype(image_HWC.dtype)


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """Sets a square to zero, whose centre lies anywhere in the image.

    Source: DeVries and Taylor, arXiv:1708.04552, section 3: parts of it may lie outside.
    """

    size: int

    def __call__(self, image_HWC: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The image of example `index` with a hole in it."""
        random = generator(seed, index, name="cutout")
        image = image_HWC.copy()
        top, left = (int(random.integers(n)) - self.size // 2 for n in image.shape[:2])
        image[max(0, top) : top + self.size, max(0, left) : left + self.size] = 0
        return image


def _blend(image: np.ndarray, other: np.ndarray | np.float32, factor: np.float32) -> np.ndarray:
    return np.clip(other + (image - other) * factor, 0, 1)
