"""Blocks and their stack: rematerialised = stored, unrolled = looped, packed = apart, dropout."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.errors import UserError
from lmjax.layers.remat import Tensors
from lmjax.models.gpt import gpt
from lmjax.sharding import Layout, unbox
from lmjax.tasks.causal_lm import CausalLM

SIZES = {"num_layers": 3, "dim": 32, "num_heads": 4, "vocab_size": 50, "max_length": 16}


@pytest.fixture(scope="module")
def variables():
    """As initialised but for biases, which are as random as the rest."""
    model, random = gpt(**SIZES), np.random.default_rng(5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))

    def draw(path, x):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return (center + 0.02 * random.normal(size=x.shape)).astype("f4")

    return jax.tree_util.tree_map_with_path(draw, unbox(shapes))


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (2, 17)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((2, 16), "f4")}


@functools.cache
def gradients_of(train=False, **changes):
    """(variables, batch) -> (loss, gradients), compiled once for all tests."""
    task = CausalLM(model=gpt(**SIZES, **changes))

    def loss(variables, batch):
        return task.loss(variables, batch, jax.random.key(7), train=train).loss.value

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "full", "unroll": 2, "dropout": 0.2, "train": True},
        pytest.param({"remat": "dots", "unroll": 3}, marks=pytest.mark.slow),
        pytest.param({"remat": "attention"}, marks=pytest.mark.slow),
        pytest.param({"remat": "offload"}, marks=pytest.mark.slow),
        {"remat": Tensors(keep=("up", "attention"), offload=("block", "qkv"))},
    ],
)
def test_remat_and_unroll_change_no_number(variables, batch, change):
    """The masks of dropout are drawn again as they were."""
    same = {name: change[name] for name in ("dropout", "train") if name in change}
    plain = gradients_of(**same)(variables, batch)
    other = gradients_of(**change)(variables, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other)


QKV, HEADS, HIDDEN, WIDTH = (4, 3, 8), (4, 8), (128,), (32,)


@pytest.mark.parametrize(
    ("policy", "kept", "offloaded"),
    [
        ("dots", [WIDTH, WIDTH, HIDDEN, QKV], []),
        ("attention", [WIDTH, HEADS, QKV], []),
        ("full", [WIDTH], []),
        ("offload", [], [WIDTH]),
        (Tensors(keep=("up",), offload=("attention", "block")), [HIDDEN], [WIDTH, HEADS]),
    ],
)
def test_what_policies_keep(variables, batch, policy, kept, offloaded):
    """All that a layer hands to its backward pass for each token, and in which memory."""
    task = CausalLM(model=gpt(**SIZES, remat=policy))

    def loss(variables):
        return task.loss(variables, batch, jax.random.key(0), train=False).loss.value

    steps = jax.make_jaxpr(jax.grad(loss))(variables).jaxpr.eqns
    loops = [step for step in steps if step.primitive.name == "scan"]
    avals = [x.aval for loop in loops if not loop.params["reverse"] for x in loop.outvars]
    layers = [x for x in avals if x.shape[:3] == (3, 2, 16)]  # layers, batch, length

    def shapes(space):
        return sorted(x.shape[3:] for x in layers if x.memory_space == space)

    assert shapes(jax.memory.Space.Device) == sorted(kept)
    assert shapes(jax.memory.Space.Host) == sorted(offloaded)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dots", "attention", "full"])
def test_remat_saves_memory(policy):
    tokens = jnp.zeros((8, 16), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((8, 16))}

    def temporaries(remat):
        task = CausalLM(model=gpt(**{**SIZES, "num_layers": 12}, remat=remat))
        init = jax.eval_shape(lambda: unbox(task.init(jax.random.key(0), batch)))

        def loss(variables):
            return task.loss(variables, batch, jax.random.key(0), train=False).loss.value

        return jax.jit(jax.grad(loss)).lower(init).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(policy) < 0.8 * temporaries("none")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": ("kqv",)}, "'kqv'; those of a block are block, qkv, .* mean 'qkv'"),
        ({"offload": ("up",), "keep": ("up",)}, "both keeps and offloads up"),
    ],
)
def test_tensors_that_are_not_there_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Tensors(**fields)


def test_tensor_parallel_residuals_stay_split(devices):
    """Products gather and scatter the length; no sum over devices is of a whole activation."""
    sizes = {"num_layers": 2, "dim": 32, "num_heads": 8, "vocab_size": 64, "max_length": 16}
    task, mesh = CausalLM(model=gpt(**sizes)), Layout(data=1, tensor=8).mesh(devices)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (2, 16)).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((2, 16), "f4")}
    boxed = jax.eval_shape(lambda: task.init(jax.random.key(0), batch))
    split = sharding.shardings_of(boxed, mesh)
    made = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), unbox(boxed), split
    )

    def loss(variables):
        with sharding.use(mesh):
            return task.loss(variables, batch, jax.random.key(0), train=True).loss.value

    step = jax.jit(jax.grad(loss), out_shardings=split).lower(made).compile()
    found = re.findall(r"= \w+\[([\d,]*)\].*? ([a-z]+-[a-z]+)\(", step.as_text())
    shapes = {}
    for shape, kind in found:
        shapes.setdefault(kind, []).append(np.prod([int(n) for n in shape.split(",") if n]))
    assert set(shapes["reduce-scatter"]) == {2 * 16 // 8 * 32}  # [B, T / 8, D]
    assert max(shapes["all-reduce"]) < 2 * 16 * 32  # the loss's sums and the gradients of norms


def test_packed_documents_equal_documents_apart(variables):
    """Two documents in one row, told apart by segments and positions, as if each had its own."""
    model = gpt(**SIZES)
    random = np.random.default_rng(1)
    first, second = random.integers(0, 50, (1, 9)), random.integers(0, 50, (1, 7))
    apply = jax.jit(model.apply)
    packed = apply(
        variables,
        np.concatenate([first, second], axis=1),
        segments_BT=np.array([[1] * 9 + [2] * 7]),
        positions_BT=np.array([[*range(9), *range(7)]]),
    ).hidden_BTD
    apart = [apply(variables, document).hidden_BTD for document in (first, second)]
    np.testing.assert_allclose(packed, np.concatenate(apart, axis=1), rtol=1e-5, atol=1e-5)


def test_no_token_sees_a_later_one(variables):
    """The gradient of position t by the embedding of position s is zero for s > t, only then."""
    model = gpt(**SIZES)
    tokens = np.arange(16)[None]  # every position has an embedding row of its own

    def hidden(table):
        params = {**variables["params"], "embed": {"table": table}}
        return model.apply({"params": params}, tokens).hidden_BTD[0].sum(-1)

    by_row = jax.jit(jax.jacrev(hidden))(variables["params"]["embed"]["table"])[:, :16]
    # A sum over a normalised vector has no gradient: look at the sizes before it is summed away.
    flows = np.abs(by_row).sum(-1) > 1e-9
    assert not np.triu(flows, k=1).any()


def test_dropout_is_off_outside_training_and_random_within(variables, batch):
    plain = gradients_of()(variables, batch)[0]
    off = gradients_of(dropout=0.2)(variables, batch)[0]
    np.testing.assert_allclose(off, plain, rtol=1e-6)
    run = gradients_of(dropout=0.2, train=True)
    on = run(variables, batch)[0]
    assert abs(on - off) > 1e-4
    assert on == run(variables, batch)[0]


def test_bfloat16_products_stay_near_float32(variables, batch):
    """bf16 keeps 8 bits of mantissa: a product is within 2**-8 relatively, the mean loss closer."""
    exact = gradients_of()(variables, batch)[0]
    low = gradients_of(dtype="bfloat16")(variables, batch)[0]
    assert low != exact
    np.testing.assert_allclose(low, exact, rtol=2**-8)
