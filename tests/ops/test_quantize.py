"""8-bit products: their formulas in numpy, their errors, and the switch that asks for them."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.ops.matmul import matmul
from lmjax.ops.quantize import (
    Quantized,
    check_device,
    products,
    products_at,
    quantize,
    quantized_contract,
)


def draw(seed, *shapes):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype("f4") for shape in shapes]


def error(found, wanted):
    """Root mean square of the error over that of what is wanted."""
    return np.sqrt(np.mean((np.asarray(found) - wanted) ** 2) / np.mean(np.asarray(wanted) ** 2))


def int8(x, axis):
    """x rounded to 127ths of its largest along an axis, in numpy's float64."""
    step = np.abs(x.astype("f8")).max(axis=axis, keepdims=True) / 127
    return np.round(x / step) * step


def fp8(x, dtype):
    step = np.abs(x.astype("f8")).max() / float(ml_dtypes.finfo(dtype).max)
    return (x / step).astype("f4").astype(dtype).astype("f8") * step


@functools.partial(jax.jit, static_argnames=("kind", "in_dims"))
def run(kind, x, w, dy, in_dims=1):
    product = functools.partial(matmul, dtype="float32", products=kind, in_dims=in_dims)
    y, pull = jax.vjp(product, x, w)
    return y, *pull(dy)


def test_int8_is_its_formula():
    x, w, dy = draw(0, (6, 64), (64, 48), (6, 48))
    y, dx, dw = run("int8", x, w, dy)
    np.testing.assert_allclose(y, int8(x, 1) @ int8(w, 0), atol=1e-4)
    np.testing.assert_allclose(dx, int8(dy, 1) @ int8(w, 1).T, atol=1e-4)
    np.testing.assert_allclose(dw, x.T @ dy, atol=1e-4)  # not quantised


def test_fp8_is_its_formula():
    x, w, dy = draw(1, (6, 64), (64, 48), (6, 48))
    y, dx, dw = run("fp8", x, w, dy)
    x8, w8 = (fp8(a, ml_dtypes.float8_e4m3fn) for a in (x, w))
    dy8 = fp8(dy, ml_dtypes.float8_e5m2)
    for found, wanted in ((y, x8 @ w8), (dx, dy8 @ w8.T), (dw, x8.T @ dy8)):
        # A quotient in float32 instead of float64 may round to the neighbour, now and then.
        assert error(found, wanted) < 2e-3


@pytest.mark.parametrize(
    ("kind", "forward", "backward"), [("int8", 0.012, 0.012), ("fp8", 0.04, 0.07)]
)
def test_errors_on_gaussian_numbers(kind, forward, backward):
    x, w, dy = draw(2, (64, 512), (512, 384), (64, 384))
    y, dx, dw = run(kind, x, w, dy)
    assert 0 < error(y, x @ w) < forward
    assert 0 < error(dx, dy @ w.T) < backward
    assert error(dw, x.T @ dy) < (1e-6 if kind == "int8" else backward)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_axes_of_the_models(kind):
    """Heads in, heads out and transposed weights, against the same numbers as plain matrices."""
    x, w, dy = draw(3, (2, 5, 24), (24, 12), (2, 5, 12))
    flat = run(kind, x.reshape(10, 24), w, dy.reshape(10, 12))
    shapes = ((2, 5, 12), (2, 5, 24), (24, 12))
    want = [np.asarray(a).reshape(s) for a, s in zip(flat, shapes, strict=True)]

    def same(found, shapes):
        for a, b, shape in zip(found, want, shapes, strict=True):
            np.testing.assert_allclose(np.reshape(a, shape), b, rtol=1e-5, atol=1e-5)

    same(run(kind, x, w.reshape(24, 3, 4), dy.reshape(2, 5, 3, 4)), shapes)
    same(run(kind, x.reshape(2, 5, 6, 4), w.reshape(6, 4, 12), dy, in_dims=2), shapes)

    how = Quantized(
        kind=kind,
        x_axes=(2,),
        w_axes=(1,),
        dtype=jnp.dtype("float32"),
        result=jnp.dtype("float32"),
    )

    @jax.jit
    def transposed(x, w, dy):
        y, pull = jax.vjp(lambda x, w: quantized_contract(x, w, how), x, w.T)
        dx, dw_transposed = pull(dy)
        return y, dx, dw_transposed.T

    same(transposed(x, w, dy), shapes)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_zeros_stay_zero_and_what_is_not_finite_is_not_hidden(kind):
    x, w, dy = draw(4, (4, 16), (16, 8), (4, 8))
    x[1], dy[2] = 0, 0
    y, dx, _ = run(kind, x, w, dy)
    assert np.all(np.isfinite(y)) and not np.any(y[1])
    assert np.all(np.isfinite(dx)) and not np.any(dx[2])
    for bad in (np.nan, np.inf):
        x[3, 5] = bad
        assert not np.any(np.isfinite(run(kind, x, w, dy)[0][3]))


def test_the_scale_is_the_largest_number():
    x = jnp.asarray([[1.0, -4.0, 2.0], [0.0, 0.5, 0.25]])
    q, scale = quantize(x, (1,), jnp.int8)
    assert q.dtype == jnp.int8 and scale.shape == (2, 1)
    np.testing.assert_array_equal(q, [[32, -127, 64], [0, 127, 64]])
    q, scale = quantize(x, None, jnp.float8_e4m3fn)
    assert scale.shape == (1, 1) and float(q[0, 1]) == -448


def test_dtypes_of_results_and_gradients():
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in draw(5, (4, 16), (16, 8)))
    for kind in ("int8", "fp8"):
        y, dx, dw = jax.eval_shape(functools.partial(run, kind), x, w, jnp.ones((4, 8)))
        assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)


def test_the_compiled_product_multiplies_int8():
    x, w = draw(6, (4, 64), (64, 32))
    text = jax.jit(lambda x, w: run("int8", x, w, jnp.ones((4, 32)))).lower(x, w).as_text()
    assert text.count("xi8>) -> tensor") == 2  # y and dx
    compiled = jax.jit(lambda x, w: matmul(x, w, dtype="float32", products="int8"))
    lines = compiled.lower(x, w).compile().as_text().splitlines()
    (dot,) = (i for i, line in enumerate(lines) if " dot(" in line)
    operands = [line for line in lines[:dot] if "= s8[" in line and " parameter(" in line]
    assert "= s32[4,32]" in lines[dot] and len(operands) >= 2


def test_the_switch_is_a_regex_over_paths_and_retraces():
    up, out = ("blocks", "mlp", "up", "kernel"), ("blocks", "attention", "out", "kernel")
    assert products_at(up) == "default"
    with products("int8", where="mlp/"):
        assert (products_at(up), products_at(out)) == ("int8", "default")
        with products("fp8"):
            assert products_at(out) == "fp8"
    assert products_at(up) == "default"

    x, w = draw(7, (4, 16), (16, 8))
    f = jax.jit(lambda x, w: matmul(x, w, dtype="float32", products=products_at(up)))
    exact = f(x, w)
    with products("int8"):
        assert error(f(x, w), exact) > 1e-4
    np.testing.assert_array_equal(f(x, w), exact)


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "has"),
    [
        ("cpu", "cpu", None, True),
        ("tpu", "TPU7x", None, True),
        ("tpu", "TPU v6 lite", None, False),
        ("tpu", "TPU v5", None, False),
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0", True),
        ("gpu", "NVIDIA L4", "8.9", True),
        ("gpu", "NVIDIA B200", "10.0", True),
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", False),
        ("gpu", "AMD Instinct MI300X", "gfx942", False),
    ],
)
def test_fp8_only_where_the_device_has_it(platform, kind, capability, has):
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    for other in ("default", "int8"):
        check_device(other, device)
    if has:
        check_device("fp8", device)
    else:
        with pytest.raises(UserError, match=f"{kind} has no fp8 units. NVIDIA GPUs of"):
            check_device("fp8", device)
