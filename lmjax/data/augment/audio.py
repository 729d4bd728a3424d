"""Augmentation of sound with numpy: gain, noise, time shift, and masks of a spectrogram.

Every function is pure in (sound, seed, index). Waves are float32 [T] in [-1, 1]; spectrograms
float32 [T, F], of T frames and F frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmjax.data.augment.draws import generator
from lmjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Makes a wave louder or softer by decibels that are uniform in [low, high]; no clipping."""

    low_db: float = -6.0
    high_db: float = 6.0

    def __call__(self, wave_T: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The wave of example `index`, scaled."""
        decibels = generator(seed, index, name="gain").uniform(self.low_db, self.high_db)
        return wave_T * np.float32(10 ** (decibels / 20))


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Adds white noise; signal to noise, of mean squares, is uniform in [low, high] decibels."""

    low_db: float = 10.0
    high_db: float = 40.0

    def __call__(self, wave_T: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The wave of example `index` with noise; silence stays silence."""
        random = generator(seed, index, name="noise")
        decibels = random.uniform(self.low_db, self.high_db)
        noise_T = random.standard_normal(len(wave_T)).astype(np.float32)
        power = float(np.mean(np.square(wave_T, dtype=np.float64))) if len(wave_T) else 0.0
        own = float(np.mean(np.square(noise_T, dtype=np.float64))) if len(wave_T) else 1.0
        scale = np.sqrt(power / 10 ** (decibels / 10) / own)
        return wave_T + noise_T * np.float32(scale)


@dataclass(frozen=True, kw_only=True)
class TimeShift:
    """Moves a wave by up to `samples` either way; what it leaves is silence."""

    samples: int

    def __call__(self, wave_T: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The wave of example `index`, later or earlier; of the same length."""
        random = generator(seed, index, name="time shift")
        shift = int(random.integers(-self.samples, self.samples + 1))
        shift = max(-len(wave_T), min(len(wave_T), shift))
        moved = np.zeros_like(wave_T)
        moved[max(0, shift) : len(wave_T) + min(0, shift)] = wave_T[
            max(0, -shift) : len(wave_T) - max(0, shift)
        ]
        return moved


@dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """Masks bands of frequencies and stretches of time with the spectrogram's mean.

    Source: Park et al., arXiv:1904.08779, section 2: a band is f frequencies, f uniform in
    [0, frequency_mask], from f0 uniform in [0, F - f]; a stretch likewise, of at most
    `time_share` of all frames. Departures: no time warping, which the paper finds to matter least;
    bounds are inclusive. The defaults are its policy LD.
    """

    frequency_masks: int = 2
    frequency_mask: int = 27
    time_masks: int = 2
    time_mask: int = 100
    time_share: float = 1.0

    def __post_init__(self) -> None:
        """Refuses a share that is none."""
        if not 0 <= self.time_share <= 1:
            raise UserError(f"time_share is {self.time_share}: give one in [0, 1].")

    def __call__(self, frames_TF: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The spectrogram of example `index`, masked."""
        random = generator(seed, index, name="SpecAugment")
        num_frames, num_frequencies = frames_TF.shape
        masked, mean = frames_TF.copy(), frames_TF.mean() if frames_TF.size else 0
        for _ in range(self.frequency_masks):
            band = _stretch(num_frequencies, self.frequency_mask, random)
            masked[:, band] = mean
        longest = min(self.time_mask, int(self.time_share * num_frames))
        for _ in range(self.time_masks):
            masked[_stretch(num_frames, longest, random)] = mean
        return masked


def _stretch(total: int, longest: int, random: np.random.Generator) -> slice:
    size = int(random.integers(min(longest, total) + 1))
    first = int(random.integers(total - size + 1))
    return slice(first, first + size)
