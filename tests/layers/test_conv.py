"""Convolutions against sums written out, batch normalisation against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.layers.batch_norm import BatchNorm
from lmjax.layers.conv import Conv, ConvTranspose


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def variables_of(layer, x, **arguments):
    return sharding.unbox(layer.init(jax.random.key(0), x, **arguments))


@pytest.mark.parametrize(
    ("size", "stride", "padding", "height"),
    [(3, 1, 1, 5), (3, 2, 1, 6), (7, 2, 3, 9), (1, 2, 0, 5)],
)
def test_convolution_is_the_sum_over_its_window(size, stride, padding, height):
    layer = Conv(4, size, stride=stride, padding=padding, use_bias=True)
    x_BHWC = drawn(2, height, height, 3)
    variables = variables_of(layer, x_BHWC)
    bias_F = drawn(4, seed=1)
    variables["params"]["bias"] = jnp.asarray(bias_F)
    kernel = np.asarray(variables["params"]["kernel"])
    padded = np.pad(x_BHWC, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    n = layer.out_size(height)
    expected = np.zeros((2, n, n, 4), np.float32)
    for i in range(n):
        for j in range(n):
            top, left = i * stride, j * stride
            window = padded[:, top : top + size, left : left + size]
            expected[:, i, j] = np.einsum("bhwc,hwcf->bf", window, kernel) + bias_F
    np.testing.assert_allclose(layer.apply(variables, x_BHWC), expected, atol=1e-5)
    assert layer.flop(height, height, 3) == 2 * n * n * size * size * 3 * 4


@pytest.mark.parametrize(("size", "stride", "padding"), [(4, 2, 1), (3, 1, 1), (3, 2, 0)])
def test_a_transposed_convolution_spreads_each_pixel(size, stride, padding):
    layer = ConvTranspose(4, size, stride=stride, padding=padding)
    x_BHWC = drawn(2, 3, 3, 5)
    variables = variables_of(layer, x_BHWC)
    kernel = np.asarray(variables["params"]["kernel"])[::-1, ::-1]  # as torch has it
    n = layer.out_size(3)
    whole = np.zeros((2, n + 2 * padding, n + 2 * padding, 4), np.float32)
    for i in range(3):
        for j in range(3):
            spread = np.einsum("bc,hwcf->bhwf", x_BHWC[:, i, j], kernel)
            top, left = i * stride, j * stride
            whole[:, top : top + size, left : left + size] += spread
    expected = whole[:, padding : padding + n, padding : padding + n]
    np.testing.assert_allclose(layer.apply(variables, x_BHWC), expected, atol=1e-5)


def test_batch_normalisation_is_its_formula_and_keeps_averages():
    layer, x_BHWC = BatchNorm(momentum=0.75), 3 + 2 * drawn(4, 5, 5, 3)
    variables = variables_of(layer, x_BHWC)
    scale_C, bias_C = drawn(3, seed=1), drawn(3, seed=2)
    variables["params"] = {"scale": jnp.asarray(scale_C), "bias": jnp.asarray(bias_C)}
    mean_C, var_C = x_BHWC.mean((0, 1, 2)), x_BHWC.var((0, 1, 2))
    y, changed = layer.apply(variables, x_BHWC, train=True, mutable=["batch_stats"])
    expected = (x_BHWC - mean_C) / np.sqrt(var_C + 1e-5) * scale_C + bias_C
    np.testing.assert_allclose(y, expected, atol=1e-5)
    stats = jax.device_get(changed["batch_stats"])
    np.testing.assert_allclose(stats["mean"], 0.25 * mean_C, rtol=1e-5)
    unbiased_C = x_BHWC.reshape(-1, 3).var(0, ddof=1)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * unbiased_C, rtol=1e-5)
    y = layer.apply({**variables, **changed}, x_BHWC)
    expected = (x_BHWC - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * scale_C + bias_C
    np.testing.assert_allclose(y, expected, atol=1e-5)
