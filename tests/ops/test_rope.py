"""Rotary positions: rotation in the complex plane, distances alone, Llama 3.1's frequencies."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.ops.rope import (
    LinearScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    frequencies,
    magnitude,
    rotate,
)

K = 16
SCALED = Rope(theta=500_000.0, scaling=RopeScaling(factor=8.0))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rope", [Rope(), Rope(theta=1e6), SCALED])
def test_rotation_is_a_product_of_complex_numbers(rope):
    x_BTHK = draw(0, 2, 5, 3, K)
    positions_BT = np.random.default_rng(1).integers(0, 100, (2, 5))
    z = x_BTHK[..., : K // 2] + 1j * x_BTHK[..., K // 2 :].astype(np.complex128)
    turned = z * np.exp(1j * positions_BT[..., None, None] * frequencies(rope, K).astype(float))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x_BTHK, positions_BT, rope), expected, rtol=1e-4, atol=1e-5)


def test_frequencies_without_scaling():
    expected = [10_000.0 ** (-2 * i / K) for i in range(K // 2)]
    np.testing.assert_allclose(frequencies(Rope(), K), expected, rtol=1e-6)


def test_scaling_is_meta_s():
    """The branches of the released code, one frequency at a time."""

    def scale(freq, factor=8.0, low=1.0, high=4.0, old=8192):
        wavelength = 2 * math.pi / freq
        if wavelength < old / high:
            return freq
        if wavelength > old / low:
            return freq / factor
        smooth = (old / wavelength - low) / (high - low)
        return (1 - smooth) * freq / factor + smooth * freq

    plain = [500_000.0 ** (-2 * i / 128) for i in range(64)]
    expected = [scale(f) for f in plain]
    np.testing.assert_allclose(frequencies(SCALED, 128), expected, rtol=1e-6)
    ratio = np.array(expected) / plain
    assert ratio[0] == 1 and ratio[-1] == 1 / 8 and ((ratio > 1 / 8) & (ratio < 1)).any()


def test_linear_scaling_reads_positions_closer():
    x, positions = draw(0, 2, 5, 3, K), np.arange(10).reshape(2, 5)
    scaled = rotate(x, positions, Rope(scaling=LinearScaling(factor=4.0)))
    np.testing.assert_allclose(scaled, rotate(x, positions / 4, Rope()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_the_paper_s(truncate):
    """Its ramp pair by pair; where ends are not whole pairs it crosses 0 and 1 where they turn so.

    A pair of K in all turns r(i) = length / wavelength times; i(r) inverts it.
    """
    theta, length, dim = 1e4, 4096, 128
    scaling = YarnScaling(factor=16.0, original_length=length, truncate=truncate)
    found = frequencies(Rope(theta=theta, scaling=scaling), dim)
    plain = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    turns = length * plain / (2 * math.pi)
    whole = [i for i in range(dim // 2) if turns[i] >= 32]
    slow = [i for i in range(dim // 2) if turns[i] <= 1]
    np.testing.assert_allclose(found[whole[:-1]], plain[whole[:-1]], rtol=1e-6)
    np.testing.assert_allclose(found[slow[1:]], plain[slow[1:]] / 16, rtol=1e-6)
    first = dim / 2 * math.log(length / (32 * 2 * math.pi)) / math.log(theta)
    last = dim / 2 * math.log(length / (2 * math.pi)) / math.log(theta)
    if truncate:
        first, last = whole[-1], slow[0]
    for i in range(whole[-1] + 1, slow[0]):
        kept = 1 - (i - first) / (last - first)
        np.testing.assert_allclose(found[i], plain[i] * (kept + (1 - kept) / 16), rtol=1e-6)


def test_yarn_sharpens_scores():
    def size(**changes):
        scaling = YarnScaling(factor=4.0, original_length=64, **changes)
        return magnitude(Rope(scaling=scaling))

    assert size() == pytest.approx(0.1 * math.log(4) + 1)
    assert size(attention_factor=1.5) == 1.5
    both = size(mscale=1.0, mscale_all_dim=0.5)
    assert both == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    x = draw(1, 1, 4, 2, K)
    turned = rotate(
        x, jnp.arange(4)[None], Rope(scaling=YarnScaling(factor=4.0, original_length=64))
    )
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), size() * np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_either_of_two_rotations_is_taken():
    x, positions = draw(2, 2, 5, 3, K), jnp.arange(5)[None]
    other = Rope(theta=100.0, scaling=YarnScaling(factor=4.0, original_length=64))
    for use, expected in ((True, other), (False, SCALED)):
        found = rotate(x, positions, SCALED, other=other, use_other=jnp.asarray(use))
        np.testing.assert_allclose(found, rotate(x, positions, expected), rtol=1e-6, atol=1e-6)


def test_products_depend_on_distance_alone():
    q, k = draw(2, 1, 1, 1, K), draw(3, 1, 1, 1, K)

    def product(i, j):
        at = [jnp.array([[p]]) for p in (i, j)]
        return jnp.sum(rotate(q, at[0], Rope()) * rotate(k, at[1], Rope()))

    np.testing.assert_allclose(product(7, 3), product(107, 103), rtol=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_length_is_kept_and_position_0_changes_nothing():
    x = draw(4, 1, 3, 2, K)
    turned = rotate(x, jnp.array([[0, 9, 1000]]), Rope())
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )
    assert rotate(x.astype(jnp.bfloat16), jnp.array([[0, 1, 2]]), Rope()).dtype == jnp.bfloat16


def test_one_row_of_positions_serves_all_rows():
    x, positions = draw(5, 3, 4, 2, K), jnp.arange(4)[None]
    every = jnp.broadcast_to(positions, (3, 4))
    np.testing.assert_allclose(
        rotate(x, positions, Rope()), rotate(x, every, Rope()), rtol=1e-5, atol=1e-6
    )


def test_bad_settings_are_refused():
    for change in ({"factor": float("inf")}, {"factor": 2.0, "original_length": 0}):
        with pytest.raises(UserError, match="all finite"):
            RopeScaling(**change)
    with pytest.raises(UserError, match="must be at least 1 and finite"):
        LinearScaling(factor=0.5)
    with pytest.raises(UserError, match="0 < beta_slow < beta_fast"):
        YarnScaling(factor=2.0, original_length=64, beta_fast=1.0)
    with pytest.raises(UserError, match=r"attention_factor is -1.0"):
        YarnScaling(factor=2.0, original_length=64, attention_factor=-1.0)
    with pytest.raises(UserError, match="rope_theta is 1: with YaRN"):
        Rope(theta=1.0, scaling=YarnScaling(factor=2.0, original_length=64))
    with pytest.raises(UserError, match="rope_theta is inf"):
        Rope(theta=float("inf"))
    with pytest.raises(UserError, match="it must be even"):
        frequencies(Rope(), 5)
    with pytest.raises(UserError, match="low_freq_factor < high_freq_factor"):
        RopeScaling(factor=8.0, low_freq_factor=4.0)
