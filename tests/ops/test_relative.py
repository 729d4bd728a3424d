"""Biases by distance: buckets against the formula, the layout along diagonals against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.relative import buckets, relative_bias


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 128), (4, 10), (6, 50)])
def test_buckets_are_those_of_the_formula(num_buckets, max_distance):
    """In float64, a trifle up, so that no boundary is missed from below."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    steps = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    far = exact + np.floor(steps * (num_buckets - exact) + 1e-9).astype(int)
    expected = np.where(distance < exact, distance, np.minimum(far, num_buckets - 1))
    np.testing.assert_array_equal(buckets(num_buckets, max_distance), expected)


def test_buckets_of_t5_by_hand():
    """Its decoder: 16 of one distance each, then 16 ever wider ones; at 32 of them 3 eighths on."""
    found = buckets(32, 128)
    assert list(found[:17]) == list(range(17))
    assert (found[31], found[32], found[64], found[127], found[128]) == (21, 21, 26, 31, 31)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize(("T", "S", "offset"), [(7, 7, 0), (3, 11, 5), (1, 9, 8)])
def test_bias_and_its_gradient_equal_loops(both_ways, T, S, offset):
    random = np.random.default_rng(0)
    table, weights = random.normal(size=(8, 2)), random.normal(size=(2, T, S))
    half = buckets(4 if both_ways else 8, 6)
    expected, gradient = np.zeros((2, T, S)), np.zeros((8, 2))
    for t, s in np.ndindex(T, S):
        distance = s - (offset + t)
        bucket = half[min(abs(distance) if both_ways else max(-distance, 0), 6)]
        bucket += 4 * (both_ways and distance > 0)
        expected[:, t, s] = table[bucket]
        gradient[bucket] += weights[:, t, s]

    @jax.jit
    def run(table, offset):
        bias = lambda table: relative_bias(  # noqa: E731
            table, T, S, offset=offset, max_distance=6, both_ways=both_ways
        )
        found, pull = jax.vjp(bias, table)
        return found, *pull(jnp.asarray(weights, jnp.float32))

    found, of_table = run(jnp.asarray(table, jnp.float32), jnp.int32(offset))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(of_table, gradient, rtol=1e-5, atol=1e-6)
