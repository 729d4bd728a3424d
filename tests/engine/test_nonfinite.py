"""What is named is what was broken: the input, or the equation with its module, layer and pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.engine.guard import Guard
from lmjax.engine.nonfinite import evaluate, first
from lmjax.engine.program import draft_program
from lmjax.models.gpt import gpt
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM

LARGE = 3e38
ROUNDING = "convert_element_type"
LAYERS, BATCH, LENGTH, VOCABULARY = 3, 4, 8, 24
BLOCK = "DecoderLM/blocks/block"


def divided(x):
    """Divides by zero where x is 0, and does not use that."""
    return jnp.where(x == 0, 1.0, 1 / x)


def attended(x, mask):
    return jax.nn.softmax(jnp.where(mask, x, -jnp.inf), axis=-1)


def chain(x, weights):
    """x through one product per weight."""
    return jax.lax.scan(lambda x, w: (x @ w, x), x, weights)[0]


def search(x, limit):
    """Doubles x up to the limit, and once more."""
    return jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) < limit, lambda x: 2 * x * x, x)


def branched(x):
    return jax.lax.cond(x > 0, jnp.log, lambda x: 1 / x, x)


@jax.custom_vjp
def loud(x):
    return x


loud.defvjp(lambda x: (x, None), lambda _, g: (g * LARGE * 2,))


@pytest.mark.parametrize(
    ("function", "args", "primitive", "phase"),
    [
        (divided, [np.array([1.0, 2.0], "f4")], None, None),
        (divided, [np.array([1.0, 0.0], "f4")], None, None),
        # The derivative of 1 / x, of which no mask undoes that it is multiplied by 0.
        (jax.grad(lambda x: jnp.sum(divided(x))), [np.zeros(2, "f4")], "integer_pow", "forward"),
        (lambda x: 1 / x, [np.zeros(2, "f4")], "div", "forward"),
        (lambda x: jnp.log(x), [np.zeros(2, "f4")], "log", "forward"),
        # A -inf that may be meant gives way to the NaN that is made of it.
        (lambda x: x * jnp.log(x), [np.zeros(2, "f4")], "mul", "forward"),
        (lambda x: jnp.exp(x + jnp.log(0 * x)), [np.ones(2, "f4")], None, None),
        # One that is an overflow does not.
        (lambda x: (y := x @ -x) - y, [np.full((2, 2), 1e30, "f4")], "dot_general", "forward"),
        (attended, [np.ones((2, 3), "f4"), np.eye(2, 3, dtype=bool)], None, None),
        (attended, [np.ones((2, 3), "f4"), np.zeros((2, 3), bool)], "sub", "forward"),
        (lambda x: x + jnp.inf, [np.float32(1)], None, None),
        (lambda best: (best, jnp.minimum(best, 3.0)), [np.float32(np.inf)], None, None),
        (jax.checkpoint(lambda x: 1 / x), [np.zeros(2, "f4")], "div", "forward"),
        (jax.grad(lambda x: jnp.sum(loud(x))), [np.ones(2, "f4")], "mul", "backward"),
        (lambda x: x.astype("bfloat16") + 1, [np.array([3.4e38], "f4")], ROUNDING, "forward"),
        (branched, [np.float32(0)], "div", "forward"),
    ],
)  # fmt: skip
def test_the_first_equation_is_found(function, args, primitive, phase):
    found = first(function, *args)
    assert (found and found.primitive, found and found.phase) == (primitive, phase)
    if found:
        assert 0 < found.share <= 1
        assert found.source.startswith("tests/") or "test_nonfinite.py:" in found.source


def test_inputs_come_first():
    state = {"kernel": np.ones((2, 3), "f4"), "bias": np.zeros(3, "f4")}
    state["kernel"][1, 2] = np.nan
    found = first(lambda state, x: x @ state["kernel"] + 1 / state["bias"], state, np.ones(2, "f4"))
    assert (found.array, found.phase, found.index) == ("state/kernel", "input", (1, 2))
    assert (found.num_nan, found.num_positive, found.num_negative) == (1, 0, 0)
    assert found.share == 1 / 6
    assert str(found).startswith("state/kernel, given\n")
    # A row that does not matter is no finding.
    assert first(lambda state: state["kernel"][0], state) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_iteration_of_a_loop_is_found(seed):
    """The oracle multiplies matrix after matrix in numpy."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(5, 4)).astype("f4")
    weights = random.normal(size=(6, 4, 4)).astype("f4")
    large = random.integers(6)
    weights[large] = LARGE * np.sign(weights[large])
    y, expected = x, -1
    with np.errstate(over="ignore", invalid="ignore"):
        while np.isfinite(y).all():
            expected += 1
            y = y @ weights[expected]
    found = first(chain, x, weights)
    assert (found.primitive, found.loops) == ("dot_general", (((), expected),))
    assert found.share == np.mean(~np.isfinite(y))


def test_the_iteration_of_the_backward_loop_is_found():
    """The forward pass meets only zeros at layer 2, whose weights overflow on the way back."""
    x, weights = np.ones((5, 4), "f4"), np.stack([np.eye(4, dtype="f4")] * 6)
    weights[1], weights[2] = 0, LARGE
    found = first(jax.grad(lambda x, w: jnp.sum(chain(x, w))), x, weights)
    assert (found.primitive, found.phase) == ("dot_general", "backward")
    assert found.loops == (((), 2),)


def test_the_iteration_of_a_while_loop_is_found():
    x = np.array([3.0], "f4")
    assert first(search, x, np.float32(1e20)) is None
    found = first(search, x, np.float32(np.inf))
    y, expected = x, -1
    with np.errstate(over="ignore"):
        while np.isfinite(y).all():
            y, expected = 2 * y * y, expected + 1
    assert (found.primitive, found.loops) == ("mul", (((), expected),))


def test_what_is_evaluated_is_what_is_compiled():
    random = np.random.default_rng(0)
    x, weights = (random.normal(size=s).astype("f4") for s in ((5, 4), (6, 4, 4)))

    def function(x, weights):
        key = jax.random.key(3)
        y = jax.checkpoint(chain)(x, weights) + jax.random.normal(key, x.shape)
        y = jax.lax.cond(y[0, 0] > 0, jnp.sin, jnp.cos, y)
        return jnp.sort(y), search(x, 100.0), jax.grad(lambda w: jnp.sum(chain(x, w)))(weights)

    outputs, found = evaluate(jax.make_jaxpr(function)(x, weights), [x, weights], ["x", "weights"])
    assert found is None
    for new, old in zip(outputs, jax.jit(function)(x, weights), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


@functools.cache
def step_of(microbatches=1, **changes):
    """(draft, state, batch) of a small GPT."""
    model = gpt(
        num_layers=LAYERS,
        dim=8,
        num_heads=2,
        vocab_size=VOCABULARY,
        max_length=LENGTH,
        dropout=0.0,
        **changes,
    )
    shape = jax.ShapeDtypeStruct((LENGTH,), np.int32)
    example = {"tokens": shape, "targets": shape, "weights": shape.update(dtype=np.float32)}
    draft = draft_program(
        CausalLM(model=model),
        optax.sgd(1e-3),
        Layout(),
        example,
        batch_size=BATCH,
        microbatches=microbatches,
        guard=Guard(),
        devices=jax.devices()[:1],
    )
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (2, BATCH, LENGTH), dtype=np.int32)
    weights = np.ones((BATCH, LENGTH), "f4")
    batch = {"tokens": tokens[0], "targets": tokens[1], "weights": weights}

    def values(path, shape):
        if path[-1].key == "scale":
            return np.ones(shape.shape, shape.dtype)
        return 0.3 * random.normal(size=shape.shape).astype(shape.dtype)

    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), draft.abstract_state)
    params = jax.tree_util.tree_map_with_path(values, draft.abstract_state.params)
    return draft, dataclasses.replace(state, params=params), batch


def broken(state, **changes):
    """The state with changed parameters; a name may be short: `up_kernel`."""
    flat = {path: value.copy() for path, value in flatten_dict(state.params, sep="/").items()}
    for name, change in changes.items():
        (path,) = [path for path in flat if path.endswith(name.replace("_", "/"))]
        change(flat[path])
    return dataclasses.replace(state, params=unflatten_dict(flat, sep="/"))


def finding_of(draft, state, batch):
    leaves = jax.tree_util.tree_flatten_with_path((state, batch))[0]
    names = [jax.tree_util.keystr(path[1:], simple=True, separator="/") for path, _ in leaves]
    return evaluate(draft.jaxpr, [leaf for _, leaf in leaves], names)


@pytest.mark.slow
def test_a_sound_step_has_no_finding():
    assert finding_of(*step_of())[1] is None


@pytest.mark.slow
def test_a_sound_step_is_the_compiled_one():
    draft, state, batch = step_of()
    outputs, _ = finding_of(draft, state, batch)
    placed = jax.device_put((state, batch), jax.devices()[0])
    expected = draft.compile().train_step(*placed)
    for new, old in zip(outputs, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_a_parameter_that_is_nan_is_named():
    draft, state, batch = step_of()

    def spoil(kernel):
        kernel[2, 3, 1] = np.nan

    found = finding_of(draft, broken(state, up_kernel=spoil), batch)[1]
    assert (found.array, found.index) == ("params/blocks/block/mlp/up/kernel", (2, 3, 1))


def test_an_infinite_value_of_the_batch_is_named():
    draft, state, batch = step_of()
    weights = batch["weights"].copy()
    weights[2, 5] = np.inf
    found = finding_of(draft, state, {**batch, "weights": weights})[1]
    assert (found.array, found.index, found.num_positive) == ("weights", (2, 5), 1)


@pytest.mark.parametrize(
    ("layer", "name", "module"),
    [
        (1, "up_kernel", "mlp/up"),
        (2, "qkv_kernel", "attention/qkv"),
        (0, "out_kernel", "attention/out"),
    ],
)
def test_an_overflow_is_named_by_layer_and_module(layer, name, module):
    draft, state, batch = step_of()

    def enlarge(kernel):
        kernel[layer] = LARGE * np.sign(kernel[layer])

    found = finding_of(draft, broken(state, **{name: enlarge}), batch)[1]
    assert (found.module, found.layer) == (f"{BLOCK}/{module}", layer)
    assert (found.primitive, found.phase) == ("dot_general", "forward")
    assert "up to 3e+38" in " ".join(found.operands)
    assert found.source.startswith("lmjax/ops/matmul.py:")
    assert str(found).startswith(f"{BLOCK}/{module}, layer {layer}, forward pass\n")


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"remat": "full", "microbatches": 2, "unroll": 3}, marks=pytest.mark.slow)],
    ids=["plain", "remat"],
)
def test_an_overflow_of_the_backward_pass_alone_is_named(layer, changes):
    draft, state, batch = step_of(**changes)

    def silence(array):
        array[layer] = 0

    def enlarge(array):
        array[layer] = LARGE * np.sign(array[layer])

    state = broken(state, up_kernel=silence, up_bias=silence, down_kernel=enlarge)
    state.params["norm"]["scale"][...] = 1e3  # a larger gradient, of the same numbers before it
    outputs, found = finding_of(draft, state, batch)
    assert (found.module, found.layer) == (f"{BLOCK}/mlp/down", layer)
    assert (found.primitive, found.phase) == ("dot_general", "backward")
    shapes, structure = jax.tree.flatten(draft.abstract_metrics)
    means = jax.tree.unflatten(structure, outputs[-len(shapes) :])
    assert np.isfinite(means["loss"].value)
    assert not np.isfinite(means["grad_norm"].value)
    assert ("microbatch 0" in str(found)) == bool(changes)
