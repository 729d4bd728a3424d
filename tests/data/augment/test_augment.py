"""Augmentation: pure in (seed, index), and what must stay as it was stays so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import build, call, ref
from lmjax.data.augment.audio import Gain, Noise, SpecAugment, TimeShift
from lmjax.data.augment.image import ColourJitter, Cutout, Flip, RandomCrop
from lmjax.data.augment.text import BackTranslation, SpanCorruption, TokenDropout, WordDropout
from lmjax.errors import UserError

RANDOM = np.random.default_rng(0)
TOKENS = np.arange(100, 160)
IMAGE = RANDOM.random((12, 10, 3)).astype(np.float32)
WAVE = RANDOM.standard_normal(400).astype(np.float32) / 4
FRAMES = RANDOM.standard_normal((60, 40)).astype(np.float32)
CORRUPTION = SpanCorruption(sentinels=range(999, 899, -1), end_id=1)


def upper(text: str) -> str:
    return text.upper()


def exclaim(text: str) -> str:
    return text + "!"


@pytest.mark.parametrize(
    ("augment", "example"),
    [
        (CORRUPTION, TOKENS),
        (WordDropout(rate=0.5), "one two  three\nfour five six seven eight"),
        (TokenDropout(id=7, rate=0.5), TOKENS),
        (BackTranslation(forward=upper, back=exclaim, rate=0.5), "text"),
        (RandomCrop(height=8, width=6, padding=2), IMAGE),
        (Flip(), IMAGE),
        (ColourJitter(), IMAGE),
        (ColourJitter(), (IMAGE * 255).astype(np.uint8)),
        (Cutout(size=5), IMAGE),
        (Gain(), WAVE),
        (Noise(), WAVE),
        (TimeShift(samples=20), WAVE),
        (SpecAugment(frequency_mask=8, time_mask=20), FRAMES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_pure_in_seed_and_index(augment: Callable[..., Any], example: Any) -> None:
    def drawn(seed: int, index: int) -> bytes | str:
        found = augment(example, seed=seed, index=index)
        if isinstance(found, str):
            return found
        parts = found if isinstance(found, tuple) else (found,)
        assert isinstance(found, tuple) or found.dtype == example.dtype
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)

    before = example.copy() if isinstance(example, np.ndarray) else example
    found = [drawn(3, index) for index in range(12)]
    np.random.seed(1)
    assert found == [drawn(3, index) for index in reversed(range(12))][::-1]
    assert len(set(found)) > 1 and found != [drawn(4, index) for index in range(12)]
    np.testing.assert_array_equal(example, before)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 300),
    rate=st.floats(0.01, 0.95),
    mean=st.floats(1, 9),
    index=st.integers(0, 2**40),
)
def test_span_corruption_loses_nothing(length: int, rate: float, mean: float, index: int) -> None:
    corrupt = SpanCorruption(sentinels=range(9999, 9000, -1), end_id=1, rate=rate, mean_span=mean)
    tokens = np.arange(2, length + 2)
    inputs, targets = corrupt(tokens, seed=0, index=index)
    assert inputs[-1] == targets[-1] == 1
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token > 9000:
            spans[token] = held = []
        else:
            held.append(token)
    assert all(spans.values()) and list(spans) == list(range(9999, 9999 - len(spans), -1))
    joined = [t for token in inputs[:-1].tolist() for t in spans.get(token, [token])]
    assert joined == tokens.tolist()
    noise = min(max(round(length * rate), 1), length - 1)
    assert sum(map(len, spans.values())) == noise
    assert len(spans) == min(max(round(noise / mean), 1), noise, length - noise)
    assert inputs[0] == 2  # a gap comes first, as in T5


def test_spans_are_uniform() -> None:
    """6 tokens, 3 of them noise in 2 spans: 2 x 2 ways, all as likely."""
    corrupt = SpanCorruption(sentinels=range(9), end_id=1, rate=0.5, mean_span=1.5)
    found = Counter(str(corrupt.spans(6, seed=0, index=i).tolist()) for i in range(2000))
    assert len(found) == 4
    assert all(abs(count - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75) for count in found.values())


def test_bad_corruption() -> None:
    with pytest.raises(UserError, match=r"rate is 1\.0"):
        SpanCorruption(sentinels=(), end_id=1, rate=1.0)
    with pytest.raises(UserError, match="1 tokens cannot be corrupted"):
        CORRUPTION(TOKENS[:1], seed=0, index=0)
    with pytest.raises(UserError, match="give 3 spans, and there are 1 sentinels"):
        SpanCorruption(sentinels=(5,), end_id=1)(TOKENS, seed=0, index=0)


def test_words_are_left_out() -> None:
    text = " ".join(f"w{i}" for i in range(1000)) + "\n"
    drop = WordDropout(rate=0.2)
    words = drop(text, seed=0, index=1).split()
    assert abs(len(words) - 800) < 5 * np.sqrt(1000 * 0.16)
    places = [int(word[1:]) for word in words]
    assert places == sorted(set(places))
    assert WordDropout(rate=0)(text, seed=0, index=0) == text
    assert drop("", seed=0, index=0) == ""
    assert all(WordDropout(rate=0.99)("a b c", seed=0, index=i).strip() for i in range(20))


def test_back_translation_is_a_hook_of_the_config() -> None:
    recorded = call(BackTranslation, forward=ref(upper), back=ref(exclaim), rate=0.5)
    augment = build(recorded)
    found = Counter(augment("a", seed=0, index=index) for index in range(400))
    assert set(found) == {"a", "A!"} and abs(found["a"] - 200) < 50


def test_crops_are_windows() -> None:
    crop = RandomCrop(height=8, width=6)
    windows = {IMAGE[y : y + 8, x : x + 6].tobytes(): (y, x) for y in range(5) for x in range(5)}
    found = {windows[crop(IMAGE, seed=0, index=i).tobytes()] for i in range(300)}
    assert len(found) == 25
    whole = RandomCrop(height=12, width=10, padding=0)
    np.testing.assert_array_equal(whole(IMAGE, seed=0, index=0), IMAGE)
    padded = RandomCrop(height=16, width=14, padding=2)(IMAGE, seed=0, index=0)
    np.testing.assert_array_equal(padded[2:-2, 2:-2], IMAGE)
    with pytest.raises(UserError, match="holds no crop"):
        RandomCrop(height=13, width=6)(IMAGE, seed=0, index=0)


def test_flips_and_holes() -> None:
    flips = [Flip()(IMAGE, seed=0, index=i) for i in range(100)]
    mirrored = sum(np.array_equal(image, IMAGE[:, ::-1]) for image in flips)
    same = sum(np.array_equal(image, IMAGE) for image in flips)
    assert mirrored + same == 100 and 25 < mirrored < 75
    for index in range(50):
        hole = (Cutout(size=4)(IMAGE, seed=0, index=index) != IMAGE).any(-1)
        rows, columns = np.nonzero(hole)
        assert 4 <= len(rows) <= 16
        assert hole[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_colours() -> None:
    none = ColourJitter(brightness=0, contrast=0, saturation=0)
    np.testing.assert_allclose(none(IMAGE, seed=0, index=0), IMAGE, atol=1e-6)
    bytes_ = (IMAGE * 255).astype(np.uint8)
    np.testing.assert_array_equal(none(bytes_, seed=0, index=0), bytes_)
    for index in range(20):
        image = ColourJitter()(IMAGE, seed=0, index=index)
        assert image.min() >= 0 and image.max() <= 1
    grey = np.repeat(IMAGE[..., :1], 3, axis=-1)
    kept = ColourJitter(brightness=0, contrast=0, saturation=0.9)(grey, seed=0, index=3)
    np.testing.assert_allclose(kept, grey, atol=1e-5)
    dark = ColourJitter(brightness=0.5, contrast=0, saturation=0)(IMAGE / 2, seed=0, index=3)
    factor = dark / (IMAGE / 2)
    np.testing.assert_allclose(factor, factor.mean(), rtol=1e-4)


def test_waves() -> None:
    for index in range(20):
        ratio = Gain()(WAVE, seed=0, index=index) / WAVE
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
        assert -6.001 <= 20 * np.log10(ratio[0]) <= 6.001
        noise = Noise(low_db=20, high_db=20)(WAVE, seed=0, index=index) - WAVE
        measured = 10 * np.log10(np.mean(WAVE**2) / np.mean(noise**2))
        assert measured == pytest.approx(20, abs=1e-3)
    assert not Noise()(np.zeros(9, np.float32), seed=0, index=0).any()
    shifts = set()
    for index in range(200):
        moved = TimeShift(samples=3)(WAVE, seed=0, index=index)
        shift = next(s for s in range(-3, 4) if np.array_equal(moved, shifted(WAVE, s)))
        shifts.add(shift)
    assert shifts == set(range(-3, 4))
    assert TimeShift(samples=9)(WAVE[:2], seed=0, index=1).shape == (2,)


def shifted(wave: np.ndarray, shift: int) -> np.ndarray:
    return np.array(
        [wave[i - shift] if 0 <= i - shift < len(wave) else 0 for i in range(len(wave))]
    )


def test_masks_of_a_spectrogram() -> None:
    mask = SpecAugment(
        frequency_masks=1, frequency_mask=8, time_masks=2, time_mask=99, time_share=0.2
    )
    sizes = set()
    for index in range(200):
        masked = mask(FRAMES, seed=0, index=index)
        changed = masked != FRAMES
        np.testing.assert_array_equal(masked[changed], FRAMES.mean())
        times, bands = changed.all(1), changed.all(0)
        np.testing.assert_array_equal(changed, times[:, None] | bands[None])
        assert bands.sum() <= 8 and times.sum() <= 24
        assert (np.diff(np.flatnonzero(bands)) == 1).all()
        sizes.add(int(bands.sum()))
    assert sizes == set(range(9))
    none = SpecAugment(frequency_masks=0, time_masks=0)
    np.testing.assert_array_equal(none(FRAMES, seed=0, index=0), FRAMES)
    with pytest.raises(UserError, match="time_share is 2"):
        SpecAugment(time_share=2)
