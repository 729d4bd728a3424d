"""A pipeline over stages = a loop over layers, and how weights and work are spread over it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lmjax import sharding
from lmjax.core import Mean
from lmjax.engine.program import compile_program
from lmjax.errors import UserError
from lmjax.layers.pipeline import _by_stage, pipelined
from lmjax.layers.transformer import Stack
from lmjax.models.gpt import gpt
from lmjax.models.moe import moe
from lmjax.sharding import Layout, Pipeline
from lmjax.tasks.causal_lm import CausalLM

D, T = 8, 4
AXES = {"w": (None, "mlp"), "b": ("norm",)}
PLAN = ("stages", "microbatches", "repeats")


def layer(weights, x_BTD, index, microbatch, along):
    """Undefined at x = 0, and different for each layer, position and segment."""
    del microbatch
    x_BTD = x_BTD * jax.lax.rsqrt(jnp.sum(x_BTD**2, axis=-1, keepdims=True))
    shift_BT = along["positions"] * 0.1 + along["segments"] * (index + 1.0)
    x_BTD = jnp.tanh(x_BTD @ weights["w"] + weights["b"][None, None] + shift_BT[..., None])
    return x_BTD, {"size": Mean.of(x_BTD**2 * (1.0 + index))}


def looped(weights, x_BTD, along):
    def body(x_BTD, xs):
        x_BTD, aux = layer(xs[0], x_BTD, xs[1], 0, along)
        return x_BTD, aux["size"]

    x_BTD, aux = jax.lax.scan(body, x_BTD, (weights, jnp.arange(len(weights["w"]))))
    return x_BTD, jax.tree.map(lambda total: jnp.sum(total, axis=0), aux)


@pytest.mark.parametrize(
    ("layout", "plan", "num_layers"),
    [
        ({"stage": 4, "tensor": 2}, (4, 4, 3), 12),
        pytest.param({"stage": 2, "data": 2}, (2, 4, 1), 4, marks=pytest.mark.slow),
        pytest.param({"stage": 4, "fsdp": 2}, (4, 8, 1), 4, marks=pytest.mark.slow),
        pytest.param({"stage": 4}, (4, 2, 1), 8, marks=pytest.mark.slow),
        pytest.param({"stage": 2, "fsdp": 2}, (2, 4, 2), 8, marks=pytest.mark.slow),
    ],
)
def test_equals_a_loop_over_the_layers(devices, layout, plan, num_layers):
    layout = Layout(**{"data": 1, **layout})
    count = np.prod([getattr(layout, axis) for axis in sharding.MESH_AXES])
    mesh, plan = layout.mesh(devices[:count]), Pipeline(**dict(zip(PLAN, plan, strict=True)))
    random = np.random.default_rng(0)
    weights = {
        "w": random.normal(size=(num_layers, D, D)).astype("f4"),
        "b": random.normal(size=(num_layers, D)).astype("f4"),
    }
    x_BTD, target = random.normal(size=(2, 16, T, D)).astype("f4")
    along = {
        "segments": random.integers(0, 3, (16, T)).astype("f4"),
        "positions": np.arange(T, dtype="f4")[None],
    }

    def loss(run, weights, x_BTD):
        y_BTD, aux = run(weights, x_BTD, along)
        return jnp.sum((y_BTD - target) ** 2) + aux.total, (y_BTD, aux)

    def piped(weights, x_BTD, along):
        with sharding.use(mesh):
            y_BTD, aux = pipelined(
                layer,
                weights,
                x_BTD,
                along,
                num_layers=num_layers,
                axes=lambda: AXES,
                plan=plan,
                wrap=lambda f: f,
            )
        return y_BTD, aux["size"]

    both = [
        jax.jit(jax.value_and_grad(partial(loss, run), argnums=(0, 1), has_aux=True))
        for run in (looped, piped)
    ]
    expected, found = (run(weights, x_BTD) for run in both)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, found
    )


@pytest.mark.parametrize(
    ("stages", "repeats"), [(2, 2), (2, 3), (4, 2), (4, 3), (4, 6), (8, 4), (8, 6)]
)
def test_weights_go_to_the_stage_that_computes_them(devices, stages, repeats):
    mesh, num_layers = Layout(stage=stages).mesh(devices), 2 * stages * repeats
    plan = Pipeline(stages=stages, repeats=repeats)
    w_L = np.random.default_rng(0).normal(size=(num_layers, 4, 2)).astype("f4")

    @jax.jit
    def moved(w_L):
        with sharding.use(mesh):
            return _by_stage(plan, w_L, (None, None))

    expected = np.moveaxis(w_L.reshape(repeats, stages, 2, 4, 2), 0, 2)
    np.testing.assert_array_equal(moved(w_L), expected)
    # Every stage sends each run of layers once, and receives as much: none has them all.
    kinds = re.findall(r"(all-\w+|collective-permute)\(", moved.lower(w_L).compile().as_text())
    assert "collective-permute" in kinds and not [k for k in kinds if k.startswith("all-")]


class Draws(nn.Module):
    """Changes nothing; aux says what each (layer, microbatch, whose number is x) drew."""

    @nn.compact
    def __call__(self, x_BTD, *, layer, train, **_):
        scale = sharding.param(self, "scale", nn.initializers.ones, (1,), ("norm",))
        where = jnp.zeros((4, 2)).at[layer, x_BTD[0, 0, 0].astype(int)].set(scale[0])
        drawn = jax.random.uniform(self.make_rng("dropout")) if train else 0.0
        return x_BTD, None, {"drawn": Mean(where * drawn, where)}


def test_randomness_differs_by_layer_and_microbatch(devices):
    """And each pair is counted once: idle ticks add nothing to aux."""
    stack = Stack(block=Draws(), num_layers=4)
    x_BTD = jnp.broadcast_to(jnp.arange(4.0).reshape(4, 1, 1) % 2, (4, 2, 2))
    variables = sharding.unbox(stack.init(jax.random.key(0), x_BTD))

    @jax.jit
    def run(variables, key):
        with sharding.use(Layout(stage=2).mesh(devices[:2])):
            return stack.apply(variables, x_BTD, train=True, rngs={"dropout": key})

    y_BTD, _, aux = run(variables, jax.random.key(1))
    np.testing.assert_array_equal(y_BTD, x_BTD)
    np.testing.assert_array_equal(aux["drawn"].weight, np.ones((4, 2)))
    assert len(np.unique(aux["drawn"].total)) == 8


@pytest.mark.parametrize(
    ("num_layers", "batch_size", "plan", "message"),
    [
        (6, 4, (4, 4, 1), "6 layers do not .* stages that fit: 1, 2, 3, 6. .* layers .*: 4 or 8"),
        (6, 4, (2, 2, 2), "With stage=2, stage_repeats that fit: 1, 3. With stage_repeats=2, "),
        (8, 4, (4, 2, 2), "stage_microbatches=2 are fewer than stage=4.* to at least 4"),
        (8, 6, (2, 4, 1), "batch of 6 rows .* nearest sizes that do: 4 or 8. .* that do: 2, 3, 6"),
    ],
)
def test_what_does_not_divide_is_refused(num_layers, batch_size, plan, message):
    with pytest.raises(UserError, match=message):
        pipelined(
            layer,
            {"w": jnp.zeros((num_layers, D, D)), "b": jnp.zeros((num_layers, D))},
            jnp.zeros((batch_size, T, D)),
            {},
            num_layers=num_layers,
            axes=lambda: AXES,
            plan=Pipeline(**dict(zip(PLAN, plan, strict=True))),
            wrap=lambda f: f,
        )


SIZES = {"dim": 16, "num_heads": 2, "vocab_size": 40, "max_length": 8}
ROWS = ("tokens", "targets", "weights", "segments", "positions")


def batches(count, length=8):
    """Packed documents, random weights."""
    random = np.random.default_rng(3)
    for _ in range(count):
        segments = np.sort(random.integers(0, 3, (16, length)), axis=1).astype("i4")
        first = np.argmax(segments[:, :, None] == segments[:, None], axis=2)
        yield {
            "tokens": random.integers(0, 40, (16, length)).astype("i4"),
            "targets": random.integers(0, 40, (16, length)).astype("i4"),
            "weights": random.integers(0, 2, (16, length)).astype("f4"),
            "segments": segments,
            "positions": (np.arange(length) - first).astype("i4"),
        }


def trained(task, layout, devices, *, steps, microbatches=1):
    """(state, metrics of each step, program) after some steps."""
    example = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in next(batches(1)).items()}
    program = compile_program(
        task,
        optax.sgd(0.3, momentum=0.9),
        layout,
        example,
        batch_size=16,
        microbatches=microbatches,
        devices=devices,
    )
    state, metrics = program.init(), []
    start = jax.device_get(state.params)
    for batch in batches(steps):
        state, found = program.train_step(state, program.put(batch))
        metrics.append({name: float(mean.value) for name, mean in found.items()})
    return start, jax.device_get(state), metrics, program


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])  # as initialised, bit by bit
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one[1:3], other[1:3]
    )


def moved(program):
    """(kind, shape) of each collective, in the order of the text."""
    found = r"= \(?\w+\[([\d,]*)\].*? (all-gather|collective-permute|all-to-all)\("
    return [
        (m[2], tuple(map(int, m[1].split(","))))
        for m in re.finditer(found, program.compiled.as_text())
    ]


@pytest.mark.slow
def test_training_on_stages_equals_training_on_one_device(devices):
    """And stages send activations to each other, never weights."""
    task = CausalLM(model=gpt(num_layers=4, **SIZES))
    one = trained(task, Layout(), devices[:1], steps=5)
    two = trained(task, Layout(stage=2, fsdp=2, data=1), devices[:4], steps=5)
    assert_same(one, two)
    collectives = moved(two[3])
    activations = (1, 4, 8, 16)  # a stage's microbatch on one device
    permutes = [shape for kind, shape in collectives if kind == "collective-permute"]
    assert permutes == [activations] * 2  # there, and back for the gradient
    # Weights are gathered over fsdp, one layer (or table) at a time.
    per_layer = {16 * 2 * 3 * 8, 16 * 64, 2 * 8 * 16, 40 * 16, 8 * 16}
    assert {np.prod(shape) for kind, shape in collectives if kind == "all-gather"} <= per_layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "microbatches", "remat"),
    [
        ({"data": 2, "stage": 2, "tensor": 2}, 2, "full"),
        ({"data": 1, "stage": 4, "fsdp": 2, "stage_microbatches": 8}, 1, "attention"),
        ({"data": 2, "stage": 4, "stage_microbatches": 4, "stage_repeats": 2}, 2, "dots"),
        ({"data": 1, "stage": 2, "tensor": 2, "fsdp": 2, "stage_repeats": 4}, 1, "offload"),
        ({"data": 1, "stage": 2, "stage_repeats": 2, "context": 2, "tensor": 2}, 1, "none"),
        ({"data": 1, "slices": 2, "stage": 2, "fsdp": 2, "stage_repeats": 2}, 2, "full"),
        ({"data": 1, "slices": 2, "stage": 2, "stage_microbatches": 4}, 1, "none"),
    ],
)
def test_training_on_stages_beside_other_axes(devices, layout, microbatches, remat):
    layout = Layout(**layout)
    count = np.prod([getattr(layout, axis) for axis in sharding.MESH_AXES])
    plain = CausalLM(model=gpt(num_layers=8, **SIZES))
    task = CausalLM(model=gpt(num_layers=8, remat=remat, **SIZES))
    one = trained(plain, Layout(), devices[:1], steps=5)
    other = trained(task, layout, devices[:count], steps=5, microbatches=microbatches)
    assert_same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 2])
def test_training_experts_on_stages(devices, repeats):
    """A mixture's z-loss is a mean over tokens, and so the same for microbatches."""
    model = moe(num_layers=4, num_experts=4, experts_per_token=2, expert_hidden=12, **SIZES)
    task = CausalLM(model=model, aux_losses={"router_z_loss": 0.1})
    one = trained(task, Layout(), devices[:1], steps=5)
    layout = Layout(data=1, stage=2, expert=2, fsdp=2, stage_repeats=repeats)
    other = trained(task, layout, devices, steps=5)
    for found in one[2] + other[2]:
        found.pop("load_balance_loss")  # a product of means over a batch
    assert_same(one, other)
