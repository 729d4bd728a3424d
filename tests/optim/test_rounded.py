"""Moments in bfloat16: what is kept, that averages stay true where the nearest number stalls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from lmjax import sharding
from lmjax.optim.presets import adamw, lion, sgd
from lmjax.optim.rounded import in_bfloat16
from lmjax.sharding import Boxed, Layout


def run(optimizer, gradients, params):
    @jax.jit
    def step(state, gradient):
        _, state = optimizer.update(gradient, state, params)
        return state, None

    return jax.lax.scan(step, optimizer.init(params), gradients)[0]


def test_a_second_moment_falls_as_in_float32_and_the_nearest_would_not():
    """Gradients of 1 for 200 steps, then of 0.1 for 600: v falls from 0.18 to 0.10."""
    params = jnp.zeros(4000)
    gradients = jnp.where(jnp.arange(800) < 200, 1.0, 0.1)[:, None] * jnp.ones((1, 4000))
    adam = optax.scale_by_adam(b2=0.999)
    wanted = run(adam, gradients, params).nu[0]
    kept = run(in_bfloat16(adam), gradients, params).rounded.nu
    assert kept.dtype == jnp.bfloat16
    kept = np.asarray(kept, "f4")
    np.testing.assert_allclose(kept.mean(), wanted, rtol=2e-3)
    assert kept.std() / wanted < 2**-9 / np.sqrt(1 - 0.999**2) * 1.25

    nearest = jnp.bfloat16(0)
    for gradient in np.asarray(gradients[:, 0]):
        v = 0.999 * float(nearest) + 0.001 * gradient**2
        nearest = jnp.asarray(v, jnp.float32).astype(jnp.bfloat16)
    assert float(nearest) > 1.5 * wanted


def test_only_the_moments_are_rounded():
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    schedule = lambda step: jnp.float32(0.1)  # noqa: E731
    for preset, copies in ((adamw, 2), (lion, 1), (sgd, 1)):
        optimizer = preset(learning_rate=schedule, moments="bfloat16", average=0.9)
        state = jax.eval_shape(optimizer.init, params)
        _, state = jax.eval_shape(optimizer.update, params, state, params)
        sizes = {"bfloat16": 0, "float32": 0, "int32": 0}
        for leaf in jax.tree.leaves(state):
            sizes[leaf.dtype.name] += leaf.size
        assert sizes["bfloat16"] == 16 * copies
        assert sizes["float32"] == 16 + 1  # the average, and the learning rate
        assert optax.tree_utils.tree_get(state, "learning_rate").dtype == jnp.float32


def test_the_first_step_is_that_of_float32():
    """Rounding comes after the update, and so is not seen by the first."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 4))}
    schedule = lambda step: jnp.float32(0.1)  # noqa: E731
    for preset in (adamw, lion, sgd):
        both = (preset(learning_rate=schedule, moments=m) for m in ("float32", "bfloat16"))
        exact, low = (o.update(params, o.init(params), params)[0]["kernel"] for o in both)
        np.testing.assert_array_equal(exact, low)


def test_moments_are_sharded_and_the_same_on_every_mesh(devices):
    mesh = Layout(fsdp=2, tensor=4, data=1).mesh(devices)
    boxed = {"kernel": Boxed(jnp.ones((8, 16)), ("embed", "mlp"))}
    params = sharding.unbox(boxed)
    gradients = {"kernel": jax.random.normal(jax.random.key(0), (5, 8, 16))}
    optimizer = in_bfloat16(optax.scale_by_adam(b2=0.95))
    split = sharding.shardings_of(jax.eval_shape(optimizer.init, boxed), mesh)
    assert split.rounded.nu["kernel"].spec == PartitionSpec("fsdp", "tensor")
    found = jax.jit(lambda g: run(optimizer, g, params), out_shardings=split)(gradients)
    jax.tree.map(np.testing.assert_array_equal, found, run(optimizer, gradients, params))
