"""The random numbers of an example: from (seed, index) alone."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, index: int, *, name: str) -> np.random.Generator:
    """A generator for one example; `name` keeps augmentations of one example independent."""
    return np.random.default_rng((int(seed) % 2**64, int(index), zlib.crc32(name.encode())))
