"""bfloat16 by chance: unbiased, and the same on every mesh; halves that join again, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.ops.rounding import join_halves, split_halves, stochastic_round
from lmjax.sharding import Layout


def numbers(size):
    """Of all magnitudes and both signs."""
    words = np.random.default_rng(0).integers(0, 2**32, size, dtype="u4")
    return words.view("f4")


def test_the_mean_of_many_roundings_is_the_number():
    x = jnp.asarray([1.0, 1.001, -3.3, 1e-6, 65537.0, 0.0, 1.00390624])
    rngs = jax.random.split(jax.random.key(0), 20_000)
    many = np.asarray(jax.vmap(lambda rng: stochastic_round(x, rng))(rngs), "f8")
    below = np.asarray(x).view("u4") & 0xFFFF0000
    low, high = below.view("f4"), (below + 0x10000).view("f4")
    assert np.all((many == low) | (many == high))  # one of the two neighbours
    gap = np.abs(high.astype("f8") - low)
    # Of 20,000 draws the mean is off by 0.0035 of the gap at most, as one standard deviation.
    assert np.all(np.abs(many.mean(0) - np.asarray(x, "f8")) < 0.015 * gap)


def test_a_bfloat16_is_never_moved():
    words = np.arange(2**16, dtype="u4") << 16  # infinities and NaNs among them
    again = stochastic_round(jnp.asarray(words.view("f4")), jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(again).view("u2"), words >> 16)


def test_rounding_does_not_depend_on_the_mesh(devices):
    x = jax.random.normal(jax.random.key(3), (16, 24))
    mesh = Layout(fsdp=2, tensor=4, data=1).mesh(devices)
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    rng = jax.random.key(4)
    found = jax.jit(stochastic_round, out_shardings=split)(jax.device_put(x, split), rng)
    np.testing.assert_array_equal(found, stochastic_round(x, rng))


def test_halves_join_again_bit_for_bit():
    edges = np.asarray([0, 0x8000, 0x7FFF, 0x18000, 0x80000000, 0x7F7FFFFF, 0x7F800000, 0xFFFFFFFF])
    x = np.concatenate([numbers(100_000), edges.astype("u4").view("f4")])
    nearest, lower = jax.jit(split_halves)(x)
    assert nearest.dtype == jnp.bfloat16 and lower.dtype == jnp.uint16
    joined = np.asarray(jax.jit(join_halves)(nearest, lower))
    np.testing.assert_array_equal(joined.view("u4"), x.view("u4"))


def test_the_upper_half_is_the_nearest_bfloat16():
    x = numbers(100_000)
    x = x[np.isfinite(x) & ((x.view("u4") & 0xFFFF) != 0x8000)]  # no ties
    nearest, _ = split_halves(jnp.asarray(x))
    np.testing.assert_array_equal(nearest, jnp.asarray(x).astype(jnp.bfloat16))
