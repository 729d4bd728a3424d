"""Mixtures of experts: equal to a loop over experts, on every mesh; what a capacity drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lmjax import sharding
from lmjax.layers.moe import Moe
from lmjax.ops import experts as experts_ops
from lmjax.sharding import Layout, unbox

B, T, D, F, E, K = 8, 8, 8, 12, 4, 2
MOE = {"dim": D, "hidden": F, "num_experts": E, "experts_per_token": K}
LAYOUTS = {
    "expert": Layout(expert=4, data=2),
    "expert-fsdp-tensor": Layout(expert=2, fsdp=2, tensor=2, data=1),
    "data": Layout(),
    "fsdp": Layout(fsdp=8, data=1),
    "expert-context": Layout(expert=2, context=2, data=2),
    "tensor-context": Layout(tensor=2, context=2, data=2),
}
DEFAULT = ("expert", "expert-fsdp-tensor")
MESHES = [
    pytest.param(layout, id=name, marks=[] if name in DEFAULT else pytest.mark.slow)
    for name, layout in LAYOUTS.items()
]


@pytest.fixture(scope="module")
def variables():
    """Weights large enough that routing is uneven and every product matters."""
    random = np.random.default_rng(2)
    shapes = jax.eval_shape(
        lambda: unbox(Moe(**MOE, shared_hidden=F).init(jax.random.key(0), jnp.zeros((1, 2, D))))
    )
    return jax.tree.map(lambda w: (0.4 * random.normal(size=w.shape)).astype("f4"), shapes)


@pytest.fixture(scope="module")
def x_BTD():
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def loop(params, x_BTD, *, scores="softmax", scale=1.0, kept=1.0, normalise=True):
    """Every expert on every token, weighted by zero where it was not chosen or is not `kept`."""
    logits = x_BTD @ params["router_kernel"]
    mask = logits >= jnp.sort(logits, axis=-1)[..., -K, None]
    score = jax.nn.softmax(logits) if scores == "softmax" else jax.nn.sigmoid(logits)
    weights = jnp.where(mask, score, 0.0)
    weights = kept * scale * weights / (weights.sum(-1, keepdims=True) if normalise else 1)

    def swiglu(gate, up, down):
        return (jax.nn.silu(x_BTD @ gate) * (x_BTD @ up)) @ down

    y = 0.0
    for e in range(len(params["gate_kernel"])):
        kernels = (params[f"{name}_kernel"][e] for name in ("gate", "up", "down"))
        y += weights[..., e, None] * swiglu(*kernels)
    if "shared" in params:
        shared = swiglu(*(params["shared"][name]["kernel"] for name in ("gate", "up", "down")))
        gate = params.get("shared_gate")
        y += shared if gate is None else jax.nn.sigmoid(x_BTD @ gate) * shared
    return y


def value_and_grad(function, params, x_BTD):
    """(y, gradients of a random projection of y by parameters and x)."""
    along = np.random.default_rng(1).normal(size=x_BTD.shape).astype(np.float32)

    def scalar(params, x):
        y = function(params, x)
        return jnp.sum(y * along), y

    compute = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
    (_, y), gradients = compute(params, x_BTD)
    return y, gradients


@pytest.fixture(scope="module")
def expected(variables, x_BTD):
    return value_and_grad(loop, variables["params"], x_BTD)


def close(found, expected, tolerance=1e-5):
    """Of the largest element: what sums in another order is off by that much anywhere."""

    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())

    jax.tree.map(one, found, expected)


def on_mesh(layout, devices, function, params, x_BTD, **settings):
    """`function` compiled for a layout, parameters and rows sharded as in training."""
    mesh = layout.mesh(devices)
    moe = Moe(**{**MOE, "shared_hidden": F, **settings})
    boxed = jax.eval_shape(lambda: moe.init(jax.random.key(0), jnp.zeros((1, 2, D))))
    params = jax.device_put(params, sharding.shardings_of(boxed, mesh)["params"])
    x_BTD = jax.device_put(x_BTD, sharding.batch_sharding(mesh))

    def run(params, x_BTD):
        with sharding.use(mesh, layout):
            return function(params, x_BTD)

    return jax.jit(run)(params, x_BTD)


def output_of(moe):
    return lambda params, x_BTD: moe.apply({"params": params}, x_BTD)[0]


@pytest.mark.parametrize(
    "settings",
    [{"scores": "sigmoid", "scale": 2.5}, pytest.param({}, marks=pytest.mark.slow)],
    ids=str,
)
def test_dropless_is_a_loop_over_experts(variables, x_BTD, settings):
    params = variables["params"]
    expected = value_and_grad(functools.partial(loop, **settings), params, x_BTD)
    moe = Moe(**MOE, shared_hidden=F, **settings)
    close(value_and_grad(output_of(moe), params, x_BTD), expected)


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
@pytest.mark.parametrize("layout", MESHES)
def test_every_mesh_is_a_loop_over_experts(variables, x_BTD, expected, devices, layout, routing):
    """The capacity is large enough for all copies."""
    moe = Moe(**MOE, shared_hidden=F, routing=routing, capacity_factor=E / K)
    run = functools.partial(value_and_grad, output_of(moe))
    found = on_mesh(layout, devices, run, variables["params"], x_BTD)
    close(jax.tree.map(np.asarray, found), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, *LAYOUTS.values()], ids=["one", *LAYOUTS])
def test_gated_shared_experts_and_weights_that_do_not_sum_to_1(variables, x_BTD, devices, layout):
    """As in Qwen1.5-MoE; the shared experts have a width of their own."""
    random = np.random.default_rng(3)
    sizes = {"gate": (D, 16), "up": (D, 16), "down": (16, D)}
    draw = lambda *shape: (0.4 * random.normal(size=shape)).astype(np.float32)  # noqa: E731
    params = {**variables["params"], "shared_gate": draw(D, 1)}
    params["shared"] = {name: {"kernel": draw(*shape)} for name, shape in sizes.items()}
    expected = value_and_grad(functools.partial(loop, normalise=False), params, x_BTD)
    settings = {"shared_hidden": 16, "gated_shared": True, "normalise": False}
    run = functools.partial(value_and_grad, output_of(Moe(**MOE, **settings)))
    if layout is None:
        found = run(params, x_BTD)
    else:
        found = on_mesh(layout, devices, run, params, x_BTD, **settings)
    close(jax.tree.map(np.asarray, found), expected)


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` as it is documented: CPUs have none. NaN where sizes disagree."""
    me = lax.axis_index(axis_name)
    everyone = lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    operands, starts, sizes, targets = everyone
    row = jnp.arange(len(output))
    for sender in range(len(send_sizes)):
        place = row - targets[sender, me]
        sent = (place >= 0) & (place < sizes[sender, me])
        source = operands[sender][jnp.clip(place + starts[sender, me], 0, len(operand) - 1)]
        output = jnp.where(sent[:, None], source, output)
    return jnp.where(jnp.all(recv_sizes == sizes[:, me]), output, jnp.nan)


def test_ragged_exchange_is_a_loop_over_experts(variables, x_BTD, expected, devices, monkeypatch):
    """The exchange of GPUs and TPUs, on an emulation of their collective."""
    dense = experts_ops._exchange_of
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated)
    monkeypatch.setattr(
        experts_ops, "_exchange_of", lambda counts, room, **_: dense(counts, room, dense=False)
    )
    run = functools.partial(value_and_grad, output_of(Moe(**MOE, shared_hidden=F)))
    found = on_mesh(Layout(expert=4, data=2), devices, run, variables["params"], x_BTD)
    close(jax.tree.map(np.asarray, found), expected)


def test_all_tokens_may_go_to_one_device(variables, x_BTD, devices):
    """The worst case that dropless has to have room for: experts 2 and 3 are one device's."""
    params = {**variables["params"], "router_kernel": jnp.zeros((D, E)).at[0].set([0, 1, 3, 2.0])}
    x_BTD = np.abs(x_BTD)
    run = functools.partial(value_and_grad, output_of(Moe(**MOE, shared_hidden=F)))
    found = on_mesh(Layout(expert=2, data=4), devices, run, params, x_BTD)
    close(jax.tree.map(np.asarray, found), value_and_grad(loop, params, x_BTD))


@pytest.mark.parametrize("routing", ["dropless", pytest.param("capacity", marks=pytest.mark.slow)])
def test_mapped_over_stages(variables, x_BTD, devices, routing):
    """As a pipeline does: each stage has parameters and tokens of its own."""
    params = jax.tree.map(lambda w: jnp.stack([w, w[..., ::-1]]), variables["params"])
    x_SBTD = jnp.stack([x_BTD, 2 * x_BTD])
    moe = Moe(**MOE, shared_hidden=F, routing=routing, capacity_factor=E / K)
    mesh = Layout(stage=2, expert=2, fsdp=2, data=1).mesh(devices)

    def run(params, x_SBTD):
        with sharding.use(mesh), sharding.mapped("stage"):
            mapped = jax.vmap(output_of(moe), spmd_axis_name="stage")
            return value_and_grad(mapped, params, x_SBTD)

    found = jax.jit(run)(params, x_SBTD)
    close(found, value_and_grad(jax.vmap(loop), params, x_SBTD))


def test_a_capacity_drops_what_comes_too_late():
    """Six tokens all want expert 0 first; it takes two of each row, and expert 1 (second) too."""
    moe = Moe(**{**MOE, "num_experts": 3}, routing="capacity", capacity_factor=0.5)
    params = unbox(jax.jit(moe.init)(jax.random.key(0), jnp.zeros((1, 2, D))))["params"]
    params["router_kernel"] = jnp.zeros((D, 3)).at[0].set(jnp.array([3.0, 2.0, 0.0]))
    params = {k: w if k == "router_kernel" else 20 * w for k, w in params.items()}
    x_BTD = np.random.default_rng(0).normal(size=(2, 6, D)).astype(np.float32)
    x_BTD[..., 0] = 1.0
    x_BTD[1, 1, 0] = -1.0  # the second token of the second row wants expert 2, then 1
    y_BTD, aux = jax.jit(moe.apply)({"params": params}, x_BTD)
    # C = ceil(0.5 * 6 * 2 / 3) = 2 copies of each expert and row.
    taken = np.zeros((2, 6, 3))
    taken[0, [0, 1], 0] = taken[0, [0, 1], 1] = 1
    taken[1, [0, 2], 0] = taken[1, [0, 1], 1] = taken[1, 1, 2] = 1
    np.testing.assert_allclose(
        y_BTD, jax.jit(loop)(params, x_BTD, kept=taken), rtol=1e-5, atol=1e-5
    )
    assert (aux["dropped_fraction"].total, aux["dropped_fraction"].weight) == (24 - 9, 24)


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_bfloat16_products_stay_near_float32(variables, x_BTD, expected, routing):
    """Operands have 8 bits of mantissa, and the routing is float32's."""
    moe = Moe(**MOE, shared_hidden=F, routing=routing, capacity_factor=E / K, dtype="bfloat16")
    found = value_and_grad(output_of(moe), variables["params"], x_BTD)
    assert float(np.abs(found[0] - expected[0]).max()) > 0
    close(found, expected, tolerance=4 * 2**-8)
    kernels = found[1][0]
    assert {w.dtype for w in jax.tree.leaves(kernels)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("layout", [LAYOUTS["expert-context"]], ids=["expert-context"])
def test_what_it_reports_is_the_same_on_every_mesh(variables, x_BTD, devices, layout):
    moe = Moe(**MOE, shared_hidden=F)

    def aux(params, x):
        return moe.apply({"params": params}, x)[1]

    found = on_mesh(layout, devices, aux, variables["params"], x_BTD)
    alone = jax.jit(aux)(variables["params"], x_BTD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, alone)
    assert found.keys() == {"load_balance_loss", "router_z_loss"}


@pytest.mark.slow
def test_a_row_that_the_mesh_does_not_divide(variables, x_BTD, devices):
    """As in decoding: one row, one token; every device then computes it."""
    params = {name: w for name, w in variables["params"].items() if name != "shared"}
    mesh = LAYOUTS["expert-context"].mesh(devices)

    def run(params, x):
        with sharding.use(mesh):
            return value_and_grad(output_of(Moe(**MOE)), params, x)

    found = jax.jit(run)(params, x_BTD[:1, :1])
    close(found, value_and_grad(loop, params, x_BTD[:1, :1]))
