"""Each optimizer against its paper's algorithm in numpy, and the frame that all of them share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import sharding
from lmjax.errors import UserError
from lmjax.optim.presets import adafactor, adamw, average_params, lion, sgd

# As a constant schedule would never show whether step t has the rate of step t.
RATES = [0.1, 0.05, 0.2]


def rate(step):
    return jnp.asarray(RATES, jnp.float32)[step]


def start():
    """A matrix and a bias, named as layers name them."""
    random = np.random.default_rng(0)
    kernel, bias = random.normal(size=(3, 4)), random.normal(size=4)
    return {"kernel": kernel.astype("float32"), "bias": bias.astype("float32")}


def gradient(params):
    """Of the sum of c p^2 / 2, c another for each element."""
    curvature = {
        k: 1 + np.arange(v.size, dtype="float32").reshape(v.shape) % 5 for k, v in params.items()
    }
    return {k: curvature[k] * v for k, v in params.items()}


def run(optimizer, params, grad=gradient, num_steps=3):
    """(params, optimizer state) after some steps."""
    state = optimizer.init(params)
    for _ in range(num_steps):
        updates, state = optimizer.update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def by_paper(step, params, num_steps=3):
    """Applies p <- step(t, g, p, memory) for t = 1, 2, ... to each parameter, in float64."""
    params = {k: v.astype("float64") for k, v in params.items()}
    memories = {name: {} for name in params}
    for t in range(1, num_steps + 1):
        grads = gradient(params)
        params = {k: step(t, grads[k], v, memories[k], k) for k, v in params.items()}
    return params


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_adamw():
    """arXiv:1711.05101, algorithm 2, lines 6-12, the rate multiplying the decay as well."""
    b1, b2, eps, decay = 0.8, 0.9, 1e-3, 0.3

    def step(t, g, p, memory, name):
        m = memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
        v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        wd = decay if name == "kernel" else 0
        return p - RATES[t - 1] * (m_hat / (np.sqrt(v_hat) + eps) + wd * p)

    optimizer = adamw(
        learning_rate=rate, b1=b1, b2=b2, epsilon=eps, weight_decay=decay, clip_norm=None
    )
    assert_same(run(optimizer, start())[0], by_paper(step, start()))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
    """Sutskever et al. (2013), equations 1-4, in the form where the momentum sums gradients."""
    momentum, decay = 0.7, 0.3

    def step(t, g, p, memory, name):
        m = memory["m"] = momentum * memory.get("m", 0) + g
        direction = g + momentum * m if nesterov else m
        return p - RATES[t - 1] * (direction + (decay * p if name == "kernel" else 0))

    optimizer = sgd(learning_rate=rate, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    assert_same(run(optimizer, start())[0], by_paper(step, start()))


def test_lion():
    """arXiv:2302.06675, algorithm 2."""
    b1, b2, decay = 0.6, 0.9, 0.3

    def step(t, g, p, memory, name):
        m = memory.get("m", 0)
        direction = np.sign(b1 * m + (1 - b1) * g)
        memory["m"] = b2 * m + (1 - b2) * g
        return p - RATES[t - 1] * (direction + (decay * p if name == "kernel" else 0))

    optimizer = lion(learning_rate=rate, b1=b1, b2=b2, weight_decay=decay, clip_norm=None)
    assert_same(run(optimizer, start())[0], by_paper(step, start()))


@pytest.mark.parametrize("clip_update", [0.5, 1e6])
def test_adafactor(clip_update):
    """arXiv:1804.04235, algorithms 4 (matrix) and 5 (vector), without the parameter's scale."""

    def step(t, g, p, memory, name):
        b2 = 1 - t**-0.8
        square = g**2 + 1e-30
        if name == "kernel":
            row = memory["row"] = b2 * memory.get("row", 0) + (1 - b2) * square.sum(1)
            col = memory["col"] = b2 * memory.get("col", 0) + (1 - b2) * square.sum(0)
            v = np.outer(row, col) / row.sum()
        else:
            v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * square
        u = g / np.sqrt(v)
        u = u / max(1, np.sqrt(np.mean(u**2)) / clip_update)
        return p - RATES[t - 1] * u

    optimizer = adafactor(learning_rate=rate, min_dim_factored=2, clip_update=clip_update)
    params, state = run(optimizer, start())
    assert_same(params, by_paper(step, start()))
    kept = sum(x.size for x in jax.tree.leaves(state) if x.ndim == 1 and x.size > 1)
    assert kept == 3 + 4 + 4  # rows, columns, and the bias: no whole second moment of the matrix


def test_decay_touches_what_the_regex_finds():
    """Without a gradient, only decay moves a parameter."""
    params = {
        "embed": {"table": jnp.ones(2)},
        "block": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)},
        "kernel_norm": {"offset": jnp.ones(2)},
    }
    none = lambda p: jax.tree.map(jnp.zeros_like, p)  # noqa: E731

    def moved(params, **options):
        optimizer = sgd(learning_rate=lambda _: jnp.float32(0.5), weight_decay=0.1, **options)
        after = sharding.unbox(run(optimizer, params, none, num_steps=1)[0])
        flat = jax.tree_util.tree_flatten_with_path(after)[0]
        names = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in flat]
        for _, value in flat:
            assert np.all(np.isclose(value, 1.0) | np.isclose(value, 0.95))
        return {name for name, (_, v) in zip(names, flat, strict=True) if np.all(v < 0.97)}

    boxed = jax.tree.map(lambda x: sharding.Boxed(x, (None,) * x.ndim), params)
    for tree in (params, boxed):
        assert moved(tree) == {"embed/table", "block/kernel"}
        assert moved(tree, decay="^block/(scale|bias)$") == {"block/scale", "block/bias"}
        assert moved(tree, decay="nothing") == set()


@pytest.mark.parametrize(("norm", "factor"), [(2.5, 0.5), (5.0, 1.0), (50.0, 1.0), (None, 1.0)])
def test_clipping_is_by_the_global_norm(norm, factor):
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0]), "b": jnp.array([-4.0])}
    optimizer = sgd(learning_rate=lambda _: jnp.float32(1.0), momentum=0.0, clip_norm=norm)
    after, _ = run(optimizer, params, lambda _: grads, num_steps=1)
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-3 * factor, 4 * factor], rtol=1e-6)


def test_average_params_is_its_recursion():
    optimizer = optax.chain(optax.sgd(0.1), average_params(0.75))
    params = start()
    state, average = optimizer.init(params), dict(params)
    for _ in range(3):
        plain = {k: p - 0.1 * gradient(params)[k] for k, p in params.items()}
        updates, state = optimizer.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        assert_same(params, plain)  # updates pass unchanged
        average = {k: 0.75 * average[k] + 0.25 * params[k] for k in params}
    assert_same(optax.tree_utils.tree_get(state, "averaged_params"), average)


def test_average_follows_the_decayed_and_scaled_update():
    params, state = run(adamw(learning_rate=rate, average=0.5), start(), num_steps=1)
    average = optax.tree_utils.tree_get(state, "averaged_params")
    assert_same(average, {k: (params[k] + v) / 2 for k, v in start().items()})


PRESETS = {"adamw": adamw, "sgd": sgd, "lion": lion, "adafactor": adafactor}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("average", [None, 0.5])
def test_state_tells_the_rate_of_the_last_step(preset, average):
    optimizer = PRESETS[preset](learning_rate=rate, average=average)
    for num_steps in (1, 2, 3):
        _, state = run(optimizer, start(), num_steps=num_steps)
        found = optax.tree_utils.tree_get(state, "learning_rate")
        assert found == np.float32(RATES[num_steps - 1])


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (adamw, {"b1": 1.0}, "b1 is 1.0: must be at least 0 and below 1"),
        (adamw, {"b2": -0.1}, "b2 is -0.1"),
        (adamw, {"epsilon": 0.0}, "epsilon is 0.0: must be positive"),
        (adamw, {"weight_decay": -1.0}, "weight_decay is -1.0: must not be negative"),
        (adamw, {"weight_decay": float("nan")}, "weight_decay is nan"),
        (adamw, {"weight_decay": float("inf")}, "weight_decay is inf"),
        (adamw, {"epsilon": float("inf")}, "epsilon is inf"),
        (adamw, {"decay": "a{99999999999}"}, "which is no regular expression"),
        (adamw, {"clip_norm": 0.0}, "clip_norm is 0.0: must be positive, or None"),
        (adamw, {"clip_norm": float("nan")}, "clip_norm is nan"),
        (adamw, {"decay": "("}, "decay is '\\(', which is no regular expression"),
        (adamw, {"average": 1.0}, "average is 1.0"),
        (sgd, {"momentum": 1.0}, "momentum is 1.0"),
        (lion, {"b2": 2.0}, "b2 is 2.0"),
        (adafactor, {"decay_rate": 1.0}, "decay_rate is 1.0"),
        (adafactor, {"clip_update": 0.0}, "clip_update is 0.0: must be positive"),
    ],
)
def test_values_out_of_range_are_refused(make, fields, message):
    with pytest.raises(UserError, match=message):
        make(learning_rate=rate, **fields)
