"""Products and lookups that are split over devices: the same numbers, and which collectives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.ops.lookup import lookup
from lmjax.ops.matmul import matmul
from lmjax.ops.spread import spread
from lmjax.sharding import Layout

# B batch, T length, D embed, H heads, K head dim, F hidden.
B, T, D, H, K, F = 8, 8, 16, 8, 4, 32
LAYOUTS = {
    "fsdp": Layout(data=1, fsdp=8),
    "tensor": Layout(data=1, tensor=8),
    "all": Layout(data=1, fsdp=2, tensor=2, context=2),
    "batch": Layout(slices=2, data=2, expert=2),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def product(x, w, axes, in_dims):
    return spread(
        lambda x, w: matmul(x, w, dtype="float32", in_dims=in_dims), x, w, axes, in_dims=in_dims
    )


CASES = {
    "columns": ((B, T, D), (D, F), ("embed", "mlp"), 1),
    "rows": ((B, T, F), (F, D), ("mlp", "embed"), 1),
    "heads": ((B, T, D), (D, H, 3, K), ("embed", "kv_heads", None, "head_dim"), 1),
    "from heads": ((B, T, H, K), (H, K, D), ("heads", "head_dim", "embed"), 2),
    "neither": ((B, T, D), (D, 5), ("embed", None), 1),
    "no length": ((B, D), (D, F), ("embed", "mlp"), 1),
    "odd length": ((B, 1, F), (F, D), ("mlp", "embed"), 1),
}


def compiled(layout, devices, function, *args):
    mesh = layout.mesh(devices)

    def step(*args):
        with sharding.use(mesh):
            return function(*args)

    return jax.jit(step).lower(*args).compile()


@layouts
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_spread_equals_the_product_on_one_device(case, layout, devices):
    x_shape, w_shape, axes, in_dims = case
    if x_shape[1:2] == (1,) and layout.context > 1:
        pytest.skip("one token cannot be split over the context")
    x, w = normal(0, *x_shape), normal(1, *w_shape)

    def run(x, w):
        y = product(x, w, axes, in_dims)
        return jnp.sum(jnp.sin(y)), y

    both = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    (_, expected), gradients = both(x, w)
    (_, found), spread_gradients = compiled(layout, devices, both, x, w)(x, w)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(spread_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@layouts
@pytest.mark.parametrize("rows", ["vocab", "positions"])
@pytest.mark.parametrize("batch", [B, 1])
def test_lookup_equals_indexing(rows, batch, layout, devices):
    table, factor = normal(0, 24, D), normal(1, B, T, D)
    index = jax.random.randint(jax.random.key(2), (batch, T), 0, 24)

    def run(table):
        found = lookup(table, index, rows=rows, dtype=jnp.dtype("float32"))
        return jnp.sum(jnp.broadcast_to(found, factor.shape) * factor), found

    (_, found), gradient = compiled(layout, devices, jax.value_and_grad(run, has_aux=True), table)(
        table
    )
    np.testing.assert_array_equal(found, table[index])
    picked = np.zeros((24, D), np.float32)
    np.add.at(picked, np.broadcast_to(index, (B, T)), factor)
    np.testing.assert_allclose(gradient, picked, rtol=1e-5, atol=1e-5)


def collectives(text):
    """Kind and result of each collective of more than one device."""
    found = re.findall(
        r"= \(?(\w+\[[\d,]*\]).*? (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text
    )
    return sorted((kind, shape) for shape, kind in found)


def test_fsdp_gathers_a_weight_at_each_use_and_scatters_its_gradient(devices):
    """One collective each way; nothing else moves, and no device sums a whole gradient."""
    x, w = normal(0, B, T, D), normal(1, D, F)
    mesh = Layout(data=1, fsdp=8).mesh(devices)
    split_w = jax.sharding.NamedSharding(mesh, sharding.spec(("embed", "mlp")))
    split_x = jax.sharding.NamedSharding(mesh, sharding.spec(("batch", None, None)))

    def loss(w, x):
        with sharding.use(mesh):
            return jnp.sum(jnp.sin(product(x, w, ("embed", "mlp"), 1)))

    step = jax.jit(
        jax.grad(loss),
        in_shardings=(split_w, split_x),
        out_shardings=split_w,
    ).lower(w, x)
    assert collectives(step.compile().as_text()) == [
        ("all-gather", f"f32[{D},{F}]"),
        ("reduce-scatter", f"f32[{D // 8},{F}]"),
    ]
