"""Weights in few bits, against numpy that takes them block by block."""

import functools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.ops import blockwise
from lmjax.ops.blockwise import KINDS, NF4, multiply, quantise, rounded

# Cut points of equal shares of a normal distribution, as QLoRA's equation 4 has them: seven steps
# below zero and eight above, with the outermost share halved.
OFFSET = 0.9677083


def drawn(*shape, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape).astype(np.float32)
    w.flat[:3] = 0.0, 40.0, -1e-6
    return w


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def made(w, kind, block, axis=0):
    return quantise(w, kind=kind, block=block, axis=axis)


dequantise = jax.jit(blockwise.dequantise)


def simply(w, kind, block):
    """Of a matrix, block by block along its first axis: (dequantised, distance of two levels)."""
    out, step = np.zeros_like(w), np.zeros_like(w)
    for column in range(w.shape[1]):
        for at in range(0, len(w), block):
            part = w[at : at + block, column]
            top = np.abs(part).max()
            scale = np.float16(top)
            if np.float32(scale) < top * np.float32(1 - 1e-6):
                scale = np.nextafter(scale, np.float16(np.inf))
            scale = np.float32(scale)
            if kind == "fp8":
                low = (part / scale * 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
                values = low / np.float32(448) * scale
                apart = np.maximum(2.0 ** (np.floor(np.log2(np.abs(low) + 1e-9)) - 3), 2.0**-9)
                step[at : at + block, column] = apart / 448 * scale
            else:
                levels = {
                    "int8": np.arange(-127, 128, dtype=np.float32) * np.float32(1 / 127),
                    "int4": np.arange(-7, 8, dtype=np.float32) * np.float32(1 / 7),
                    "nf4": np.asarray(NF4, np.float32),
                }[kind]
                nearest = np.abs(part[:, None] / scale - levels[None]).argmin(1)
                values = levels[nearest] * scale
                gaps = np.diff(levels)
                wide = np.maximum(np.append(gaps, 0), np.append(0, gaps))
                step[at : at + block, column] = wide[nearest] * scale
            out[at : at + block, column] = values
    return out, step


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_the_nearest_level(kind):
    w = drawn(150, 3)  # 64 + 64 + 22
    values = np.asarray(dequantise(made(w, kind, 64)))
    wanted, step = simply(w, kind, 64)
    np.testing.assert_allclose(values, wanted, rtol=1e-6, atol=1e-7)
    assert (np.abs(values - w) <= 0.5 * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_two_to_a_byte(kind):
    """Every pair of levels comes back, along an inner axis, row 2 i in the lower half."""
    levels = np.asarray(NF4, np.float32) if kind == "nf4" else np.arange(-7, 8) * np.float32(1 / 7)
    levels = levels.astype(np.float32)
    pairs = np.stack([x.ravel() for x in np.meshgrid(levels, levels)], axis=1)
    w = np.concatenate([pairs, np.tile([1.0, -1.0], (len(pairs), 1))], axis=1)[:, :, None]
    few = made(w.astype(np.float32), kind, 4, 1)
    assert few.data.dtype == jnp.uint8 and few.data.shape == (len(pairs), 2, 1)
    np.testing.assert_array_equal(dequantise(few), w.astype(np.float32))
    low, high = (np.asarray(few.data)[:, 0, 0] >> bits & 15 for bits in (0, 4))
    least = low.min()
    np.testing.assert_array_equal(levels[low - least], pairs[:, 0].astype(np.float32))
    np.testing.assert_array_equal(levels[high - least], pairs[:, 1].astype(np.float32))


def test_levels_of_nf4_are_quantiles_of_a_normal_distribution():
    at = NormalDist().inv_cdf
    above = [at(p) for p in np.linspace(OFFSET, 0.5, 9)[:-1]]
    below = [-at(p) for p in np.linspace(OFFSET, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below]) / above[0]
    np.testing.assert_allclose(NF4, levels, atol=1e-5)


def kinds(*by_default):
    slow = pytest.mark.slow
    return [pytest.param(k, marks=() if k in by_default else slow) for k in KINDS]


@pytest.mark.parametrize("kind", kinds("int4"))
def test_product_and_gradient_are_those_of_the_array(kind):
    """And the backward pass keeps the blocks alone."""
    blocks, x = made(drawn(12, 5), kind, 4), drawn(3, 12, seed=1)
    w = dequantise(blocks)

    @jax.jit
    def both(x, blocks, w):
        few, back = jax.vjp(lambda x: jnp.sin(multiply(jnp.dot, x, blocks)), x)
        whole, other = jax.vjp(lambda x: jnp.sin(x @ w), x)
        return (few, back(few)), (whole, other(few))

    jax.tree.map(np.testing.assert_array_equal, *both(x, blocks, w))
    _, back = jax.eval_shape(lambda x: jax.vjp(lambda x: multiply(jnp.dot, x, blocks), x), x)
    kept = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(back)}
    assert kept <= {(x.shape, x.dtype.name) for x in (blocks.data, blocks.scale)}


def test_rounding_is_straight_through():
    w = drawn(10, 4)

    @jax.jit
    def both(w):
        low, back = jax.vjp(lambda w: rounded(w, "int4", 4, 0), w)
        return low, back(jnp.cos(low))[0]

    low, gradient = both(w)
    np.testing.assert_array_equal(low, dequantise(made(w, "int4", 4)))
    np.testing.assert_allclose(gradient, np.cos(low), rtol=1e-6)


def test_refused():
    with pytest.raises(UserError, match=r"kind is 'int44'.*int4"):
        quantise(drawn(4, 4), kind="int44")
    with pytest.raises(UserError, match="block is 1"):
        quantise(drawn(4, 4), kind="int4", block=1)
    with pytest.raises(UserError, match="axis 0 has 5"):
        quantise(drawn(5, 4), kind="nf4")
    assert blockwise.bits_per_weight("int4", 64) == 4.25
