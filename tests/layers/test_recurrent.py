"""Recurrent layers against torch, against a loop in numpy, and on every mesh."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lmjax import sharding
from lmjax.errors import UserError
from lmjax.layers.recurrent import Recurrent, SharedDropout, WordDropout, keep_within
from lmjax.sharding import Layout
from tests.layers import torch_reference


def from_torch(kind, arrays):
    """Weights (or their gradients) by torch's names as ours: of an LSTM one bias."""
    gates = torch_reference.KINDS[kind]

    def kernel(weight):
        return jnp.asarray(weight.T.reshape(weight.shape[1], gates, -1))

    def bias(*vectors):
        return jnp.asarray(sum(vectors).reshape(gates, -1))

    if kind == "lstm":
        return {
            "input": {
                "kernel": kernel(arrays["weight_ih"]),
                "bias": bias(arrays["bias_ih"], arrays["bias_hh"]),
            },
            "recurrent": {"kernel": kernel(arrays["weight_hh"])},
        }
    return {
        name: {"kernel": kernel(arrays[f"weight_{end}"]), "bias": bias(arrays[f"bias_{end}"])}
        for name, end in (("input", "ih"), ("recurrent", "hh"))
    }


def compare(kind, given, expected, *, tolerance=1e-6):
    """Outputs, states and all gradients."""
    names = ("h", "c")[: 2 if kind == "lstm" else 1]
    layer = Recurrent(units=given["h"].shape[1], kind=kind, forget_bias=0.0)

    @jax.jit
    def run(args, cotangents):
        def apply(params, x, state):
            return layer.apply({"params": params}, x, state=state)

        found, pull = jax.vjp(apply, *args)
        return *found, *pull(cotangents)

    args = (from_torch(kind, given), given["x"], tuple(given[name] for name in names))
    cotangents = (given["dy"], tuple(given[f"d{name}"] for name in names))
    y, after, d_params, dx, d_state = run(args, cotangents)

    def close(found, wanted):
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=tolerance)

    close(y, expected["y"])
    close(dx, expected["gradient_x"])
    for part, d_part, name in zip(after, d_state, names, strict=True):
        close(part, expected[f"{name}_after"])
        close(d_part, expected[f"gradient_{name}"])
    gradients = {k.removeprefix("gradient_"): v for k, v in expected.items() if "_" in k}
    if kind == "lstm":  # both of torch's biases have the gradient of their sum
        np.testing.assert_array_equal(gradients["bias_ih"], gradients["bias_hh"])
        gradients["bias_hh"] = np.zeros_like(gradients["bias_hh"])
    jax.tree.map(close, d_params, from_torch(kind, gradients))


@pytest.mark.parametrize("kind", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_equals_stored_torch(kind):
    stored = np.load(Path(__file__).parent / "torch_reference.npz")
    arrays = {k.partition(":")[2]: stored[k] for k in stored if k.startswith(f"{kind}:")}
    given = torch_reference.drawn(kind, rows=3, length=7, dim=5, units=6)
    expected = {k: v for k, v in arrays.items() if k not in given}
    compare(kind, {k: arrays[k] for k in given}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", torch_reference.KINDS)
def test_equals_live_torch(kind):
    pytest.importorskip("torch")
    given = torch_reference.drawn(kind, rows=4, length=40, dim=24, units=32, seed=1)
    compare(kind, given, torch_reference.answers(kind, given))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_by_hand(params, x_TD, mask_H, begins, *, forget_bias):
    """One row in numpy, float64: hidden states [T, H]."""
    (w, b), r = (params["input"][k] for k in ("kernel", "bias")), params["recurrent"]["kernel"]
    hidden, cell, found = np.zeros(r.shape[0]), np.zeros(r.shape[0]), []
    for x, begin in zip(x_TD, begins, strict=True):
        if begin:
            hidden, cell = np.zeros_like(hidden), np.zeros_like(cell)
        i, f, g, o = (x @ w[:, k] + b[k] + (hidden * mask_H) @ r[:, k] for k in range(4))
        cell = sigmoid(f + forget_bias) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        found.append(hidden)
    return np.array(found)


def made(layer, x):
    """Parameters drawn in numpy, which compiles nothing."""
    shapes = jax.eval_shape(layer.init, jax.eval_shape(lambda: jax.random.key(0)), x[:1])
    random = np.random.default_rng(5)
    return jax.tree.map(
        lambda p: (0.4 * random.standard_normal(p.shape)).astype("f4"),
        sharding.unbox(shapes)["params"],
    )


SEGMENTS = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 3, 3, 3, 3, 4]])


def test_documents_of_a_row_are_apart_and_equal_a_loop_by_hand():
    """With an open forget gate; the gradient too sees nothing across a boundary."""
    layer = Recurrent(units=6)
    x = np.random.default_rng(0).standard_normal((3, 8, 5)).astype("f4")
    params = made(layer, x)
    keep_BT = keep_within(jnp.asarray(SEGMENTS))

    @jax.jit
    def run(x):
        return layer.apply({"params": params}, x, keep_BT=keep_BT)[0]

    begins = np.diff(SEGMENTS, axis=1, prepend=SEGMENTS[:, :1]) != 0
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = [
        lstm_by_hand(exact, x[b].astype(np.float64), np.ones(6), begins[b], forget_bias=1.0)
        for b in range(3)
    ]
    np.testing.assert_allclose(run(x), expected, atol=1e-6)
    reached = jax.jit(jax.jacobian(lambda x: run(x).sum(-1)))(jnp.asarray(x))  # [B, T, B, T, D]
    reached = np.abs(reached).sum(-1) > 0
    for b in range(3):
        for t in range(8):
            seen = np.flatnonzero(reached[b, t, b])
            assert set(seen) == {s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]}


@pytest.mark.slow
def test_gradients_equal_those_of_a_plain_scan():
    """The backward loop is written by hand: with masks, resets and a state."""
    layer = Recurrent(units=6, dropout=0.4)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((3, 8, 5)), jnp.float32)
    state = tuple(jnp.asarray(random.standard_normal((3, 6)), jnp.float32) for _ in range(2))
    dy = jnp.asarray(random.standard_normal((3, 8, 6)), jnp.float32)
    params = made(layer, x)
    keep_BT = keep_within(jnp.asarray(SEGMENTS))
    rngs = {"dropout": jax.random.key(1)}

    def ours(params, x, state):
        return layer.apply(
            {"params": params}, x, state=state, keep_BT=keep_BT, train=True, rngs=rngs
        )[0]

    def plain(params, x, state, mask):
        a_BTGH = jnp.einsum("btd,dgh->btgh", x, params["input"]["kernel"])
        a_BTGH += params["input"]["bias"][None, None]

        def step(carry, xs):
            a, keep = xs
            h, c = (s * keep[:, None] for s in carry)
            i, f, g, o = jnp.moveaxis(
                a + jnp.einsum("bd,dgh->bgh", h * mask, params["recurrent"]["kernel"]), 1, 0
            )
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        _, h = jax.lax.scan(step, state, (a_BTGH.swapaxes(0, 1), keep_BT.T.astype(jnp.float32)))
        return h.swapaxes(0, 1)

    mask = recovered_mask(layer, params, rngs)
    assert 0 < (mask == 0).mean() < 1
    np.testing.assert_allclose(mask[mask > 0], 1 / 0.6, rtol=1e-4)

    def both(function):
        found, pull = jax.vjp(function, params, x, state)
        return found, pull(dy)

    found, gradients = jax.jit(lambda: both(ours))()
    wanted, expected = jax.jit(lambda: both(lambda *args: plain(*args, mask)))()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), gradients, expected)


def recovered_mask(layer, params, rngs):
    """The mask of three rows, seen from outside: what hidden units of 1 give to their own gate."""
    units = layer.units
    eye = jnp.eye(units)
    shown = {
        "input": jax.tree.map(jnp.zeros_like, params["input"]),
        # the candidate of unit i is hidden unit i, the output gate is open
        "recurrent": {"kernel": jnp.zeros((units, 4, units)).at[:, 2].set(0.01 * eye)},
    }
    shown["input"]["bias"] = jnp.asarray([[30.0], [-30.0], [0.0], [30.0]]) * jnp.ones((4, units))
    state = (jnp.ones((3, units)), jnp.zeros((3, units)))
    x = jnp.zeros((3, 1, params["input"]["kernel"].shape[0]))
    y = jax.jit(lambda: layer.apply({"params": shown}, x, state=state, train=True, rngs=rngs)[0])()
    mask = jnp.arctanh(jnp.arctanh(y[:, 0])) / 0.01
    return jnp.where(jnp.abs(mask) < 1e-3, 0.0, mask)


def test_what_intercepts_the_product_is_in_the_backward_pass_too():
    """An interceptor is gone when that is traced: a doubled product is a doubled kernel."""
    layer = Recurrent(units=4)
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype("f4")
    params = made(layer, x)

    def doubled(run, args, kwargs, context):
        y = run(*args, **kwargs)
        called = context.method_name == "__call__" and context.module.name == "recurrent"
        return 2 * y if called else y

    def total(params, x, intercepted):
        with nn.intercept_methods(doubled) if intercepted else contextlib.nullcontext():
            return jnp.sum(jnp.square(layer.apply({"params": params}, x)[0]))

    found = jax.jit(jax.grad(lambda p, x: total(p, x, True), (0, 1)))(params, x)
    twice = {**params, "recurrent": {"kernel": 2 * params["recurrent"]["kernel"]}}
    expected, dx = jax.jit(jax.grad(lambda p, x: total(p, x, False), (0, 1)))(twice, x)
    expected["recurrent"]["kernel"] *= 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, (expected, dx)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(data=8), Layout(data=2, fsdp=4), Layout(data=2, fsdp=2, tensor=2),
     Layout(data=1, fsdp=2, context=2, tensor=2), Layout(data=2, expert=4)],
)  # fmt: skip
def test_the_same_on_every_mesh(layout, devices):
    layer = Recurrent(units=8, dropout=0.3)
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal((8, 4, n)), jnp.float32) for n in (16, 8))
    boxed = layer.init(jax.random.key(0), x[:1])["params"]
    params = sharding.unbox(boxed)

    @jax.jit
    def run(params, x):
        def apply(params, x):
            rngs = {"dropout": jax.random.key(1)}
            return layer.apply({"params": params}, x, train=True, rngs=rngs)[0]

        y, pull = jax.vjp(apply, params, x)
        return y, *pull(dy)

    expected = run(params, x)
    mesh = layout.mesh(devices)
    jax.clear_caches()  # or the trace for one device serves the mesh
    with sharding.use(mesh, layout):
        found = run(jax.device_put(params, sharding.shardings_of(boxed, mesh)), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_shared_dropout_has_one_mask_for_all_tokens():
    x = jnp.ones((4, 50, 64))
    y = SharedDropout(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert 0.15 < (np.asarray(y[:, 0]) == 0).mean() < 0.35
    assert len({row.tobytes() for row in np.asarray(y[:, 0])}) == 4
    assert SharedDropout(0.25).apply({}, x, train=False) is x


def test_word_dropout_drops_a_token_wherever_it_stands():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (3, 200)))
    dropout = WordDropout(0.5, 40)
    y = dropout.apply(
        {}, jnp.ones((3, 200, 2)), tokens, train=True, rngs={"dropout": jax.random.key(0)}
    )
    gone = []
    for row, ids in zip(np.asarray(y), np.asarray(tokens), strict=True):
        for token in np.unique(ids):
            values = row[ids == token]
            assert len(np.unique(values)) == 1 and values[0, 0] in (0.0, 2.0)
            gone.append(values[0, 0] == 0)
    assert 0.3 < np.mean(gone) < 0.7


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="Did you mean 'gru'"):
        Recurrent(units=4, kind="grru")
