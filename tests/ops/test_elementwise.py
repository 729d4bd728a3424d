"""GELU, normalisations and dropout against jax.nn and explicit formulas."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.activations import gelu, gelu_erf, swiglu
from lmjax.ops.dropout import dropout, dropout_mask
from lmjax.ops.norm import layer_norm, rms_norm


def _draw(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_gelu() -> None:
    x = jnp.linspace(-20.0, 20.0, 4001)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=True), rtol=1e-5, atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(jax.nn.gelu(x, approximate=True)))(x)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(gelu(x)))(x), slope, rtol=1e-5, atol=1e-5)
    # bf16 rounds x by at most 2^-8 of itself; |x f''(x)| of GELU stays below 0.6.
    low = jax.grad(lambda x: jnp.sum(gelu(x, dtype="bfloat16")))(x)
    np.testing.assert_allclose(low, slope, rtol=0, atol=0.6 * 2.0**-8 + 1e-5)
    assert gelu(jnp.ones((), jnp.bfloat16)).dtype == jnp.bfloat16


def test_gelu_erf() -> None:
    x = jnp.linspace(-20.0, 20.0, 4001)
    cdf = np.array([0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x])
    np.testing.assert_allclose(gelu_erf(x), x * cdf, rtol=1e-5, atol=1e-6)
    slope = cdf + x * np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)
    got = jax.grad(lambda x: jnp.sum(gelu_erf(x)))(x)
    np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-6)
    # bf16 rounds x by at most 2^-8 of itself; |x f''(x)| of GELU stays below 0.6.
    low = jax.grad(lambda x: jnp.sum(gelu_erf(x, dtype="bfloat16")))(x)
    np.testing.assert_allclose(low, slope, rtol=0, atol=0.6 * 2.0**-8 + 1e-5)
    assert gelu_erf(jnp.ones((), jnp.bfloat16)).dtype == jnp.bfloat16


def _naive_layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale[None, None] + bias[None, None]


def _naive_rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * scale[None, None]


def _check_norm(got, want, args, dy, dtype) -> None:  # type: ignore[no-untyped-def]
    def run(function):  # type: ignore[no-untyped-def]
        y, pull = jax.vjp(function, *args)
        return y, pull(dy)

    (y, grads), (y_want, grads_want) = jax.jit(lambda: (run(got), run(want)))()
    np.testing.assert_allclose(y, y_want, rtol=1e-5, atol=1e-5)  # the forward is fp32 throughout
    for a, b in zip(grads, grads_want, strict=True):
        # the kept array, of size 3 or so, is off by 2^-8 of itself; 10 rows add up in the scale
        tolerance = 2.0**-8 * 3 * 10 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm(dtype: str) -> None:
    x, scale, bias, dy = _draw(0, (2, 5, 24), (24,), (24,), (2, 5, 24))

    def ours(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return layer_norm(x, scale, bias, epsilon=1e-5, dtype=dtype)

    _check_norm(ours, _naive_layer_norm, (3 * x + 1, scale, bias), dy, dtype)
    without = layer_norm(x, scale, None, epsilon=1e-5)
    np.testing.assert_allclose(
        without, _naive_layer_norm(x, scale, jnp.zeros_like(bias)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm(dtype: str) -> None:
    x, scale, dy = _draw(1, (2, 5, 24), (24,), (2, 5, 24))

    def ours(x: jax.Array, scale: jax.Array) -> jax.Array:
        return rms_norm(x, scale, epsilon=1e-5, dtype=dtype)

    _check_norm(ours, _naive_rms_norm, (3 * x + 1, scale), dy, dtype)


def test_norms_keep_the_dtype_of_x_and_of_the_scale() -> None:
    x, scale = (a.astype(jnp.bfloat16) for a in _draw(2, (2, 5, 24), (24,)))
    assert layer_norm(x, scale, scale, epsilon=1e-5).dtype == jnp.bfloat16
    assert rms_norm(x, scale, epsilon=1e-5).dtype == jnp.bfloat16
    grads = jax.grad(
        lambda x, s: jnp.sum(layer_norm(x, s, s, epsilon=1e-5).astype(jnp.float32)), (0, 1)
    )(x, scale)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize("last", [1, 64, 65])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_statistics(rate: float, last: int) -> None:
    x = jnp.ones((65536 // last, last))
    y = np.asarray(dropout(x, rate, jax.random.key(0)))
    keep, scale = dropout_mask(jax.random.key(0), x.shape, rate)
    assert set(np.unique(y)) == {np.float32(0), np.float32(scale)}
    assert abs(scale - 1 / (1 - rate)) < 1e-4
    # five standard deviations of the mean of 65,536 coins
    assert abs(float(np.mean(y == 0)) - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    assert np.array_equal(y != 0, np.asarray(keep))
    if last > 1:  # the two halves of a word are independent: neighbours agree as often as chance
        agree = float(np.mean(keep[:, 0] == keep[:, 1]))
        chance = rate**2 + (1 - rate) ** 2
        assert abs(agree - chance) < 5 * np.sqrt(chance * (1 - chance) / keep.shape[0])


def test_dropout_is_determined_by_its_rng() -> None:
    (x,) = _draw(3, (16, 64))
    one, again, other = (dropout(x, 0.5, jax.random.key(seed)) for seed in (1, 1, 2))
    assert jnp.array_equal(one, again)
    assert not jnp.array_equal(one, other)
    assert jnp.array_equal(dropout(x, 0.0, None), x)
    grad = jax.grad(lambda x: jnp.sum(dropout(x, 0.5, jax.random.key(1))))(x)
    np.testing.assert_allclose(grad * x, one, rtol=1e-6)


def test_dropout_does_not_depend_on_the_sharding() -> None:
    if jax.device_count() < 2:
        pytest.skip("needs two devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    (x,) = _draw(4, (16, 64))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    for spec in (("data", None), (None, "data")):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        sharded = jax.jit(lambda x: dropout(x, 0.5, jax.random.key(1)))(jax.device_put(x, sharding))
        assert jnp.array_equal(sharded, dropout(x, 0.5, jax.random.key(1)))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 0.999999])
def test_impossible_dropout_rates(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout rate"):
        dropout(jnp.ones((2, 2)), rate, jax.random.key(0))
    with pytest.raises(ValueError, match="rng"):
        dropout(jnp.ones((2, 2)), 0.5, None)


def test_swiglu() -> None:
    gate, up, dy = _draw(7, (3, 50), (3, 50), (3, 50))

    def naive(gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.silu(gate) * up

    want, pull = jax.vjp(naive, 4 * gate, up)
    found, ours = jax.vjp(swiglu, 4 * gate, up)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours(dy), pull(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    low = jax.vjp(lambda *x: swiglu(*x, dtype="bfloat16"), 4 * gate, up)[1](dy)
    for a, b in zip(low, pull(dy), strict=True):
        # Kept values are off by 2^-8 of themselves; up to 16 in the gate, 3 in up and dy.
        np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-8 * 16 * 3)
