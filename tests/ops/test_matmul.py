"""matmul: values and gradients against einsum, every operand form that the models use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.matmul import activation_dtype, contract, matmul

# Rounding to bf16, 8 significant bits, is off by at most 2^-8 of the number; a product of two
# rounded operands by at most twice that and its square, summed in fp32: of |x| @ |w|, that is.
BF16 = 2.0**-7 + 2.0**-15

CASES = [  # (x shape, w shape, in_dims)
    ((2, 16, 32), (32, 64), 1),
    ((3, 7, 5), (5, 9), 1),
    ((2, 8, 12), (12, 3, 4), 1),
    ((2, 8, 12), (12, 3, 2, 4), 1),
    ((2, 8, 3, 4), (3, 4, 12), 2),
    ((5, 3, 3, 5), (3, 5, 7), 2),
    ((1, 1, 33), (33, 17), 1),
    ((1, 9, 33), (33, 17), 1),
    ((11, 6), (6, 4), 1),
    ((1, 6), (6, 4), 1),
]


def _draw(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(("x_shape", "w_shape", "in_dims"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], in_dims: int, dtype: str
) -> None:
    y_shape = x_shape[: len(x_shape) - in_dims] + w_shape[in_dims:]
    x, w, dy = _draw(0, x_shape, w_shape, y_shape)

    def naive(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, w: jnp.tensordot(x, w, axes=in_dims), x, w)
        return y, *pull(dy)

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> tuple[tuple[jax.Array, ...], ...]:
        y, pull = jax.vjp(lambda x, w: matmul(x, w, dtype=dtype, in_dims=in_dims), x, w)
        return (y, *pull(dy)), naive(x, w, dy), naive(*map(jnp.abs, (x, w, dy)))

    for a, b, size in zip(*run(x, w), strict=True):
        assert a.dtype == jnp.float32
        bound = BF16 * size if dtype == "bfloat16" else 1e-5 * jnp.maximum(size, 1.0)
        assert jnp.all(jnp.abs(a - b) <= bound)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 9, 16])
def test_contract_with_transposed_weights(dtype: str, rows: int) -> None:
    x, w, dy = _draw(1, (1, rows, 12), (21, 12), (1, rows, 21))
    y, pull = jax.vjp(lambda x, w: contract(x, w, dtype=dtype, axes=((2,), (1,))), x, w)
    want, pull_want = jax.vjp(lambda x, w: jnp.einsum("btd,vd->btv", x, w), x, w)
    # at most 21 terms of size about 1, each off by BF16 of itself
    tolerance = 21 * BF16 if dtype == "bfloat16" else 1e-5
    for a, b in zip((y, *pull(dy)), (want, *pull_want(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance)


def test_gradient_has_the_dtype_of_the_weights() -> None:
    (x, w) = _draw(2, (2, 16, 8), (8, 4))
    for dtype in (jnp.float32, jnp.bfloat16):
        grad = jax.grad(lambda w: jnp.sum(matmul(x, w, dtype="bfloat16")))(w.astype(dtype))
        assert grad.dtype == dtype


def test_operands_are_bf16_and_sums_fp32_in_the_backward_too() -> None:
    x, w = _draw(3, (2, 16, 8), (8, 4))
    grad = jax.grad(lambda x, w: jnp.sum(jnp.square(matmul(x, w, dtype="bfloat16"))), (0, 1))
    jaxpr = str(jax.make_jaxpr(grad)(x, w))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all(":f32" in line for line in products)
    assert jaxpr.count("preferred_element_type=float32") == 3
    assert "new_dtype=bfloat16" in jaxpr


def test_under_remat_and_scan() -> None:
    x, w = _draw(4, (2, 16, 8), (3, 8, 8))

    def stacked(x: jax.Array, w: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda x, w: (jnp.tanh(matmul(x, w, dtype="bfloat16")), None))
        return jnp.sum(jax.lax.scan(body, x, w)[0])

    def looped(x: jax.Array, w: jax.Array) -> jax.Array:
        for layer in w:
            x = jnp.tanh(matmul(x, layer, dtype="bfloat16"))
        return jnp.sum(x)

    got, want = jax.jit(jax.grad(stacked, (0, 1)))(x, w), jax.grad(looped, (0, 1))(x, w)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_activations_flow_in_fp32_on_a_cpu() -> None:
    assert activation_dtype("bfloat16") == jnp.float32


def test_a_misfit_is_told() -> None:
    x, w = _draw(5, (2, 16, 8), (9, 4))
    with pytest.raises(ValueError, match="cannot contract"):
        matmul(x, w, dtype="float32")
