"""Rotary position embedding."""

# Shape legend: B batch (1 where all rows share their positions), T length, H heads, K head dim.

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's change of the frequencies, by which a model reads longer contexts.

    Source: the released code of Llama 3.1 and `rope_scaling` of its configurations. Wavelengths
    beyond `original_length / low_freq_factor` tokens grow `factor` times, those below
    `original_length / high_freq_factor` stay, and the frequencies between are interpolated.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        factors = 0 < self.low_freq_factor < self.high_freq_factor < math.inf
        if not (1 <= self.factor < math.inf and factors and self.original_length >= 1):
            raise UserError(
                f"factor is {self.factor}, low_freq_factor {self.low_freq_factor}, "
                f"high_freq_factor {self.high_freq_factor} and original_length "
                f"{self.original_length}: the first and the last must be at least 1, and "
                "0 < low_freq_factor < high_freq_factor, all finite."
            )


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation's settings: pair i turns by theta^(-2i / K) a token, scaled where asked."""

    theta: float = 10_000.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.theta < math.inf:
            raise UserError(f"rope_theta is {self.theta}: must be at least 1 and finite.")


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per token of each of the K / 2 pairs, fp32; raises UserError for an odd K."""
    if head_dim % 2:
        raise UserError(f"head_dim is {head_dim}: rotary positions turn pairs, so it must be even.")
    turns = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if (scaling := rope.scaling) is not None:
        cycles = scaling.original_length * turns / (2 * math.pi)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((cycles - low) / (high - low), 0, 1)
        turns = kept * turns + (1 - kept) * turns / scaling.factor
    return turns.astype(np.float32)


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
    """Turns each pair (x_i, x_{i + K/2}) by its position's angle, in fp32.

    Source: Su et al., arXiv:2104.09864, equation 34, with the pairs of Llama and Hugging Face: the
    two halves of a head, where the paper pairs neighbours. A product of two rotated vectors depends
    on the distance of their positions alone. The result has the dtype of x.
    """
    K = x_BTHK.shape[-1]
    turns_111K = jnp.asarray(frequencies(rope, K))[None, None, None]
    angles_BT1K = positions_BT.astype(jnp.float32)[:, :, None, None] * turns_111K
    cos, sin = jnp.cos(angles_BT1K), jnp.sin(angles_BT1K)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
