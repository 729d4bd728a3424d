"""Linear in 8-bit products: one choice for a model, and the same numbers on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lmjax import sharding
from lmjax.layers.linear import Linear
from lmjax.ops.quantize import products
from lmjax.sharding import Layout

LAYOUTS = {
    "tensor": Layout(tensor=8, data=1),
    "all": Layout(fsdp=2, tensor=2, context=2, data=1),
}


class Mlp(nn.Module):
    """Columns split over `tensor`, then rows: the second product contracts what is split."""

    @nn.compact
    def __call__(self, x):
        h = Linear((32,), ("embed", "mlp"), init_std=0.3, name="up")(x)
        return Linear((16,), ("mlp", "embed"), init_std=0.3, name="down")(jnp.tanh(h))


def value_and_gradient(kind, mesh=None, where=""):
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal((8, 16, 16)), jnp.float32) for _ in range(2))
    x = x.at[:, :, 3].multiply(20)  # one feature much larger: the scale of its device alone
    boxed = Mlp().init(jax.random.key(0), x[:1])["params"]
    params = sharding.unbox(boxed)
    if mesh is not None:
        params = jax.device_put(params, sharding.shardings_of(boxed, mesh))

    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(lambda p, x: Mlp().apply({"params": p}, x), params, x)
        return y, *pull(dy)

    with products(kind, where=where):
        if mesh is None:
            return run(params, x)
        with sharding.use(mesh):
            return run(params, x)


@pytest.fixture(scope="module")
def on_one_device():
    return {kind: value_and_gradient(kind) for kind in ("default", "int8", "fp8")}


@pytest.mark.parametrize(("kind", "layout"), [("int8", "tensor"), ("int8", "all"), ("fp8", "all")])
def test_quantised_products_are_the_same_on_every_mesh(on_one_device, devices, kind, layout):
    found = value_and_gradient(kind, LAYOUTS[layout].mesh(devices))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        found,
        on_one_device[kind],
    )


def test_the_choice_reaches_the_weights_that_are_named(on_one_device):
    exact, whole = (on_one_device[kind][0] for kind in ("default", "int8"))
    none, one, both = (value_and_gradient("int8", where=w)[0] for w in ("norm", "^up/", "p|n/"))
    np.testing.assert_array_equal(none, exact)
    np.testing.assert_array_equal(both, whole)
    assert np.abs(one - exact).max() > 0 and np.abs(one - whole).max() > 0
