"""What decoding changes of a model and its weights changes no number, or only by its dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.engine.state import paths_of
from lmjax.generate.beam import BeamSearch
from lmjax.generate.decode import Decoding
from lmjax.generate.weights import (
    Weights,
    apart,
    in_dtype,
    in_float32,
    product_dtype,
    together,
    unrolled,
)
from lmjax.models.llama import llama
from lmjax.models.moe import moe
from lmjax.sharding import unbox

TOKENS = np.random.default_rng(0).integers(0, 50, (2, 8)).astype(np.int32)


def small(dtype):
    return llama(
        num_layers=2,
        dim=32,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=50,
        max_length=32,
        dtype=dtype,
    )


def drawn(model):
    """Variables far enough from uniform that a slip is seen; compiles nothing."""
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS[:, :1])
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (0.12 * random.normal(size=x.shape)).astype(x.dtype), unbox(variables)
    )


def loops(model, variables):
    run = jax.make_jaxpr(lambda: model.apply(variables, TOKENS).hidden_BTD)()
    return [
        e.params["length"] // e.params["unroll"] for e in run.eqns if e.primitive.name == "scan"
    ]


def test_unrolled_models_are_the_same_but_for_their_loop():
    model = small("float32")
    variables = drawn(model)
    assert loops(model, variables) == [2]
    assert loops(unrolled(model), variables) == [1]
    shapes = jax.eval_shape(unrolled(model).init, jax.random.key(0), TOKENS[:, :1])
    assert jax.tree.map(jnp.shape, unbox(shapes)) == jax.tree.map(jnp.shape, variables)
    looped, flat = (
        jax.jit(lambda x, m=m: m.apply(x, TOKENS).hidden_BTD)(variables)
        for m in (model, unrolled(model))
    )
    np.testing.assert_allclose(flat, looped, rtol=1e-5, atol=1e-5)


def test_operands_that_are_rounded_beforehand_are_rounded_once():
    """16 rows in bfloat16: the same numbers, where the embedding is representable."""
    model = small("bfloat16")
    assert product_dtype(model) == "bfloat16" and product_dtype(small("float32")) == "float32"
    variables = drawn(model)
    table = variables["params"]["embed"]["table"]
    variables["params"]["embed"]["table"] = np.asarray(jnp.bfloat16(table), np.float32)
    low = in_dtype(variables, product_dtype(model))
    dtypes = {path: str(x.dtype) for path, x in paths_of(low["params"]).items()}
    assert {path.split("/")[-1] for path, dtype in dtypes.items() if dtype == "float32"} == {
        "scale"
    }
    run = jax.jit(lambda variables: model.apply(variables, TOKENS).hidden_BTD)
    np.testing.assert_array_equal(run(low), run(variables))
    assert {str(x.dtype) for x in jax.tree.leaves(in_float32(low))} == {"float32"}


def mixture():
    """A dense layer and, in a stack of its own, one with experts."""
    return moe(
        num_layers=2,
        dim=32,
        num_heads=4,
        num_kv_heads=2,
        num_experts=4,
        experts_per_token=2,
        expert_hidden=16,
        num_dense_layers=1,
        dense_hidden=48,
        vocab_size=50,
        max_length=32,
    )


def test_a_router_keeps_its_dtype():
    low = jax.eval_shape(lambda x: in_dtype(x, "bfloat16"), drawn(mixture()))
    dtypes = {path: str(x.dtype) for path, x in paths_of(low["params"]).items()}
    kinds = {path.split("/")[-1]: dtype for path, dtype in dtypes.items()}
    assert kinds["router_kernel"] == "float32" and kinds["gate_kernel"] == "bfloat16"


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(small("float32"), id="llama"),
        pytest.param(mixture(), id="moe", marks=pytest.mark.slow),
    ],
)
def test_texts_are_the_same_with_layers_apart(model):
    variables = jax.device_put(drawn(model))
    weights = Weights(variables, apart(variables))
    num_layers = sum(stack.num_layers for stack in model.stacks)
    assert len(jax.tree.leaves(weights.apart)) > num_layers * 6
    jax.tree.map(np.testing.assert_array_equal, together(weights.apart), variables)
    decoding, how = Decoding(model), {"max_tokens": 8, "temperature": 0.0}
    expected = list(decoding.tokens(variables, [3, 1], **how))
    assert list(decoding.tokens(weights, [3, 1], **how)) == expected
    (found,) = BeamSearch(decoding).search(weights, [3, 1], num_beams=1, max_tokens=8)
    assert list(found.tokens) == expected


def test_layers_apart_are_no_copies():
    variables = jax.device_put(drawn(small("float32")))
    whole = variables["params"]["blocks"]["block"]["mlp"]["up"]["kernel"]
    layers = apart(variables)["params"]["blocks"]["block"]["mlp"]["up"]["kernel"]
    first = whole.unsafe_buffer_pointer()
    assert [x.unsafe_buffer_pointer() - first for x in layers] == [0, whole[0].nbytes]


@pytest.mark.parametrize("not_a_module", [object(), None])
def test_what_is_no_module_is_left_alone(not_a_module):
    assert unrolled(not_a_module) is not_a_module
    assert product_dtype(not_a_module) == "float32"
