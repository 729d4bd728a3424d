"""Blocks and their stack: rematerialised = stored, unrolled = looped, packed = apart, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.gpt import gpt
from lmjax.sharding import unbox
from lmjax.tasks.causal_lm import CausalLM

SIZES = {"num_layers": 3, "dim": 32, "num_heads": 4, "vocab_size": 50, "max_length": 16}


@pytest.fixture(scope="module")
def variables():
    return unbox(gpt(**SIZES).init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32)))


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (2, 17)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((2, 16), "f4")}


def gradients(model, variables, batch, *, train=False):
    def loss(variables):
        output = CausalLM(model=model).loss(variables, batch, jax.random.key(7), train=train)
        return output.loss.value

    return jax.jit(jax.value_and_grad(loss))(variables)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "change", [{"remat": "dots"}, {"remat": "full"}, {"unroll": 3}, {"remat": "full", "unroll": 2}]
)
def test_remat_and_unroll_change_no_number(variables, batch, change, dropout):
    train = dropout > 0
    plain = gradients(gpt(**SIZES, dropout=dropout), variables, batch, train=train)
    other = gradients(gpt(**SIZES, dropout=dropout, **change), variables, batch, train=train)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other)


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_remat_saves_memory(variables, policy):
    tokens = jnp.zeros((8, 16), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((8, 16))}

    def temporaries(remat):
        task = CausalLM(model=gpt(**{**SIZES, "num_layers": 12}, remat=remat))
        init = jax.eval_shape(lambda: unbox(task.init(jax.random.key(0), batch)))

        def loss(variables):
            return task.loss(variables, batch, jax.random.key(0), train=False).loss.value

        return jax.jit(jax.grad(loss)).lower(init).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(policy) < 0.8 * temporaries("none")


def test_packed_documents_equal_documents_apart():
    """Two documents in one row, told apart by segments and positions, as if each had its own."""
    model = gpt(**SIZES)
    variables = unbox(model.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32)))
    random = np.random.default_rng(1)
    first, second = random.integers(0, 50, (1, 9)), random.integers(0, 50, (1, 7))
    packed = model.apply(
        variables,
        np.concatenate([first, second], axis=1),
        segments_BT=np.array([[1] * 9 + [2] * 7]),
        positions_BT=np.array([[*range(9), *range(7)]]),
    ).hidden_BTD
    apart = [model.apply(variables, document).hidden_BTD for document in (first, second)]
    np.testing.assert_allclose(packed, np.concatenate(apart, axis=1), rtol=1e-5, atol=1e-5)


def test_no_token_sees_a_later_one(variables):
    """The gradient of position t by the embedding of position s is zero for s > t, only then."""
    model = gpt(**SIZES)
    tokens = np.arange(16)[None]  # every position has an embedding row of its own

    def hidden(table):
        params = {**variables["params"], "embed": {"table": table}}
        return model.apply({"params": params}, tokens).hidden_BTD[0].sum(-1)

    by_row = jax.jacrev(hidden)(variables["params"]["embed"]["table"])[:, :16]
    # A sum over a normalised vector has no gradient: look at the sizes before it is summed away.
    flows = np.abs(by_row).sum(-1) > 1e-9
    assert not np.triu(flows, k=1).any()


def test_dropout_is_off_outside_training_and_random_within(variables, batch):
    model = gpt(**SIZES, dropout=0.5)
    off = gradients(model, variables, batch)[0]
    np.testing.assert_allclose(off, gradients(gpt(**SIZES), variables, batch)[0], rtol=1e-6)
    on = gradients(model, variables, batch, train=True)[0]
    assert abs(on - off) > 1e-4
    assert on == gradients(model, variables, batch, train=True)[0]


def test_bfloat16_products_stay_near_float32(variables, batch):
    """bf16 keeps 8 bits of mantissa: a product is within 2**-8 relatively, the mean loss closer."""
    exact = gradients(gpt(**SIZES), variables, batch)[0]
    low = gradients(gpt(**SIZES, dtype="bfloat16"), variables, batch)[0]
    assert low != exact
    np.testing.assert_allclose(low, exact, rtol=2**-8)
