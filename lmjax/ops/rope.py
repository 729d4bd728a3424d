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
class LinearScaling:
    """All frequencies divided by `factor`, which is reading positions `factor` times closer.

    Source: Chen et al., arXiv:2306.15595, equation 4; `rope_type: linear` of Hugging Face.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise UserError(f"factor is {self.factor}: must be at least 1 and finite.")


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: slow frequencies are divided by `factor`, fast ones stay, and scores are sharpened.

    Source: Peng et al., arXiv:2309.00071, section 3, in the form of Hugging Face (`rope_type:
    yarn`): the ramp between the two is linear in the number of the pair, from the one that turns
    `beta_fast` times within `original_length` tokens to the one that turns `beta_slow` times.

    Args:
      attention_factor: what queries and keys are multiplied by; where not given 0.1 ln(factor) + 1
        (equation 22), or the ratio of two such terms whose logarithms are weighted by `mscale` and
        `mscale_all_dim` (DeepSeek-V2, arXiv:2405.04434, in its released code), if both are given.
      truncate: the ramp begins and ends at whole pairs.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        betas = 0 < self.beta_slow < self.beta_fast < math.inf
        if not (1 <= self.factor < math.inf and betas and self.original_length >= 1):
            raise UserError(
                f"factor is {self.factor}, beta_slow {self.beta_slow}, beta_fast {self.beta_fast} "
                f"and original_length {self.original_length}: the first and the last must be at "
                "least 1, and 0 < beta_slow < beta_fast, all finite."
            )
        given = (self.attention_factor, self.mscale, self.mscale_all_dim)
        if any(x is not None and not 0 <= x < math.inf for x in given):
            raise UserError(
                f"attention_factor is {self.attention_factor}, mscale {self.mscale} and "
                f"mscale_all_dim {self.mscale_all_dim}: none may be negative or infinite."
            )

    def magnitude(self) -> float:
        """What queries and keys are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        log = 0.1 * math.log(self.factor)
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * log + 1) / (self.mscale_all_dim * log + 1)
        return log + 1


Scaling = RopeScaling | LinearScaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation's settings: pair i turns by theta^(-2i / K) a token, scaled where asked."""

    theta: float = 10_000.0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.theta < math.inf:
            raise UserError(f"rope_theta is {self.theta}: must be at least 1 and finite.")
        if isinstance(self.scaling, YarnScaling) and self.theta == 1:
            raise UserError("rope_theta is 1: with YaRN, whose pairs must differ, give more.")


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per token of each of the K / 2 pairs, fp32; raises UserError for an odd K."""
    if head_dim % 2:
        raise UserError(f"head_dim is {head_dim}: rotary positions turn pairs, so it must be even.")
    turns = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        turns = turns / scaling.factor
    elif scaling is not None:
        kept = _kept(scaling, rope.theta, turns)
        turns = kept * turns + (1 - kept) * turns / scaling.factor
    return turns.astype(np.float32)


def _kept(scaling: RopeScaling | YarnScaling, theta: float, turns: np.ndarray) -> np.ndarray:
    """How much of each frequency stays, from 0 (divided by the factor) to 1 (as it is)."""
    if isinstance(scaling, RopeScaling):
        cycles = scaling.original_length * turns / (2 * math.pi)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return np.clip((cycles - low) / (high - low), 0, 1)
    head_dim = 2 * len(turns)

    def pair(cycles: float) -> float:
        """The pair, as a real number, that turns so often within the original context."""
        length = scaling.original_length / (cycles * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    return 1 - np.clip((np.arange(len(turns)) - first) / (last - first), 0, 1)


def magnitude(rope: Rope) -> float:
    """What the rotated vectors are multiplied by: 1 but for YaRN."""
    return rope.scaling.magnitude() if isinstance(rope.scaling, YarnScaling) else 1.0


def rotate(
    x_BTHK: jax.Array,
    positions_BT: jax.Array,
    rope: Rope,
    *,
    other: Rope | None = None,
    use_other: jax.Array | None = None,
) -> jax.Array:
    """Turns each pair (x_i, x_{i + K/2}) by its position's angle, in fp32.

    Source: Su et al., arXiv:2104.09864, equation 34, with the pairs of Llama and Hugging Face: the
    two halves of a head, where the paper pairs neighbours. A product of two rotated vectors depends
    on the distance of their positions alone. The result has the dtype of x.

    Args:
      other, use_other: another rotation, taken where this scalar is true; give both or neither.
    """
    K = x_BTHK.shape[-1]
    turns_K: jax.Array | np.ndarray = frequencies(rope, K)
    size: jax.Array | float = magnitude(rope)
    if other is not None and use_other is not None:
        turns_K = jnp.where(use_other, frequencies(other, K), turns_K)
        size = jnp.where(use_other, magnitude(other), size)
    turns_111K = jnp.asarray(turns_K)[None, None, None]
    angles_BT1K = positions_BT.astype(jnp.float32)[:, :, None, None] * turns_111K
    cos, sin = jnp.cos(angles_BT1K), jnp.sin(angles_BT1K)
    if not isinstance(size, float) or size != 1.0:
        cos, sin = cos * size, sin * size
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
