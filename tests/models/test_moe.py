"""Mixtures of experts as language models: sizes, losses, decoding, transformers' Mixtral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.models.moe import moe, moe_preset
from lmjax.ops.losses import logits
from lmjax.sharding import unbox
from lmjax.tasks.causal_lm import CausalLM

SMALL = {
    "num_layers": 3,
    "dim": 16,
    "num_heads": 2,
    "vocab_size": 50,
    "max_length": 32,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 12,
    "num_shared_experts": 1,
    "num_dense_layers": 1,
    "dense_hidden": 20,
}


def abstract_params(model):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens)
    return unbox(variables)["params"]


def drawn(model):
    """Variables far enough from uniform that a slip is seen; compiles nothing."""
    random = np.random.default_rng(0)
    draw = lambda x: (0.12 * random.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    return {"params": jax.tree.map(draw, abstract_params(model))}


@pytest.fixture(scope="module")
def model():
    return moe(**SMALL)


@pytest.fixture(scope="module")
def variables(model):
    return drawn(model)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (4, 17)).astype(np.int32)
    weights = random.integers(0, 2, (4, 16)).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"size": "8x7b"}, 46_702_792_704),
        ({"size": "a2.7b", "vocab_size": 151936}, 14_315_784_192),
        ({"size": "57b-a14b", "vocab_size": 151936}, 57_408_658_944),
        ({"size": "30b-a3b", "vocab_size": 151936}, 30_532_122_624),
        ({"size": "235b-a22b", "vocab_size": 151936}, 235_093_634_560),
        ({"size": "671b", "vocab_size": 129280}, 671_254_148_096),
    ],
)
def test_exact_parameter_counts(arguments, count):
    model = moe_preset(**arguments)
    assert sum(model.count_params(abstract_params(model)).values()) == count


def test_flop_counts_active_parameters():
    """Two for each weight that a token meets: of Mixtral's 8 experts two, and no embedding."""
    model = moe_preset(size="8x7b")
    idle = 32 * 6 * 3 * 4096 * 14336 + 32000 * 4096 + (2 * 32 + 1) * 4096  # and the norms
    attention = 32 * 4 * 4096 * 1000
    assert model.flop_per_token(1000)[1] == 2 * (46_702_792_704 - idle) + attention


def test_flop_counts_shared_experts_and_their_gate():
    """Two for each weight that a token of Qwen1.5-MoE meets: of its 60 experts four."""
    model = moe_preset(size="a2.7b", vocab_size=151936)
    idle = 24 * 56 * 3 * 2048 * 1408 + 151936 * 2048
    idle += (2 * 24 + 1) * 2048 + 24 * 3 * 2048  # norms and biases
    attention = 24 * 4 * 2048 * 1000
    assert model.flop_per_token(1000)[1] == 2 * (14_315_784_192 - idle) + attention


def test_dense_layers_come_first(model):
    shapes = {k: v.shape for k, v in paths_of(abstract_params(model)).items()}
    assert shapes["blocks/parts_0/block/mlp/up/kernel"] == (1, 16, 20)
    assert shapes["blocks/parts_1/block/mlp/up_kernel"] == (2, 4, 16, 12)
    assert shapes["blocks/parts_1/block/mlp/shared/up/kernel"] == (2, 16, 12)
    assert shapes["blocks/parts_1/block/mlp/router_kernel"] == (2, 16, 4)


def test_dense_layers_anywhere():
    sizes = {**SMALL, "num_layers": 5, "num_dense_layers": 0}
    model = moe(**sizes, mixture_layers=(False, True, True, False, True))
    shapes = {k: v.shape for k, v in paths_of(abstract_params(model)).items()}
    stacks = [f"blocks/parts_{i}/block/mlp/up" for i in range(4)]
    names = zip(stacks, ("/kernel", "_kernel", "/kernel", "_kernel"), strict=True)
    assert [shapes[path + name] for path, name in names] == [
        (1, 16, 20), (2, 4, 16, 12), (1, 16, 20), (1, 4, 16, 12),
    ]  # fmt: skip
    assert [stack.block.attention.first_layer for stack in model.stacks] == [0, 1, 3, 4]


def test_given_numbers_stand_in_place_of_the_presets():
    small = {"num_layers": 2, "dim": 64, "num_heads": 4, "num_kv_heads": 2, "expert_hidden": 24}
    mixture = lambda **given: moe_preset(**small, **given).blocks.block.mlp  # noqa: E731
    assert mixture(size="a2.7b", shared_hidden=40).shared_hidden == 40
    assert mixture(size="a2.7b", num_shared_experts=2).shared_hidden == 48
    assert mixture(size="nano").shared_hidden == 24
    assert mixture(size="nano", shared_hidden=40).shared_hidden == 40


def test_cached_logits_equal_full_forward(model, variables):
    tokens = np.random.default_rng(0).integers(0, 50, (2, 14)).astype(np.int32)
    run = jax.jit(lambda tokens, cache=None: model.apply(variables, tokens, cache=cache))
    output = run(tokens)
    expected = logits(output.hidden_BTD, output.unembedding)
    output = run(tokens[:, :9], model.init_cache(2, 16))
    found = [logits(output.hidden_BTD, output.unembedding)]
    for t in range(9, 14):
        output = run(tokens[:, t : t + 1], output.cache)
        found.append(logits(output.hidden_BTD, output.unembedding))
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_auxiliary_losses_are_descended_summed_over_layers(model, variables, batch):
    """total = nll + sum over losses of weight * sum over layers and tokens; reports are means."""
    weights = {"load_balance_loss": 0.1, "router_z_loss": 0.01}

    def run(train, aux_losses):
        task = CausalLM(model=model, aux_losses=aux_losses)
        return task.loss(variables, batch, jax.random.key(0), train=train)

    plain, found, evaluated = jax.jit(
        lambda: (run(True, {}), run(True, weights), run(False, weights))
    )()
    num_tokens, num_layers = 4 * 16, 2
    extra = sum(w * found.metrics[name].value for name, w in weights.items())
    expected = plain.loss.total + num_tokens * num_layers * extra
    np.testing.assert_allclose(found.loss.total, expected, rtol=1e-5)
    assert found.loss.weight == plain.loss.weight == batch["weights"].sum()
    assert found.metrics["router_z_loss"].weight == num_tokens * num_layers
    for name, value in {"loss": found.metrics["loss"], "descended": evaluated.loss}.items():
        np.testing.assert_allclose(value.value, plain.loss.value, rtol=1e-6, err_msg=name)
    with pytest.raises(UserError, match="Did you mean 'router_z_loss'"):
        run(True, {"router_zloss": 0.1})


@pytest.mark.slow
def test_auxiliary_losses_of_rows_add_up(model, variables, batch):
    """Gradients of totals over microbatches are the whole batch's, whatever the weights are."""
    task = CausalLM(model=model, aux_losses={"load_balance_loss": 1.0, "router_z_loss": 1.0})

    @jax.jit
    def gradient(rows):
        def total(variables):
            return task.loss(variables, rows, jax.random.key(0), train=True).loss.total

        return jax.grad(total)(variables)

    parts = [gradient({k: v[i::2] for k, v in batch.items()}) for i in range(2)]
    summed = jax.tree.map(jnp.add, *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        summed,
        gradient(batch),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 5}, "the first may not exceed the second"),
        ({"num_dense_layers": 3}, "fewer dense layers than num_layers"),
        ({"dense_hidden": None}, "dense_hidden is None"),
        ({"dense_hidden": 0}, "dense_hidden is 0"),
        ({"capacity_factor": 0.0}, "must be positive"),
        ({"scale": float("inf")}, "must be positive and finite"),
        ({"num_shared_experts": 2**24}, "shared_hidden is .*: must be at most"),
        ({"shared_hidden": 8}, "num_shared_experts is 1 and shared_hidden 8"),
        ({"shared_hidden": -1, "num_shared_experts": 0}, "shared_hidden is -1"),
        ({"gated_shared": True, "num_shared_experts": 0}, "there are no shared experts"),
        ({"normalise": False, "scores": "sigmoid"}, "normalise is False, which is for softmax"),
        ({"mixture_layers": (True,)}, "speaks of 1 layers, and num_layers is 3"),
        ({"mixture_layers": (True,) * 3}, "num_dense_layers is 1 and mixture_layers is given"),
        ({"mixture_layers": (False,) * 3, "num_dense_layers": 0}, "has no True"),
        (
            {"mixture_layers": (False, True, True), "num_dense_layers": 0, "dense_hidden": None},
            "dense_hidden is None",
        ),
        ({"num_experts": 0}, "num_experts is 0"),
    ],
)
def test_wrong_sizes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        moe(**{**SMALL, **change})


def test_unknown_preset_is_refused():
    with pytest.raises(UserError, match="Did you mean '8x7b'"):
        moe_preset(size="8x7B")


@pytest.mark.slow
def test_logits_and_gradients_equal_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.models.llama_reference import from_torch_names, ours, reference

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = np.random.default_rng(0).integers(0, 61, (3, 24))
    weights, expected, loss, gradients = reference(transformers.MixtralForCausalLM(config), tokens)
    model = moe(
        num_layers=2,
        dim=32,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=61,
        max_length=64,
        num_experts=4,
        experts_per_token=2,
        expert_hidden=24,
        rope_theta=500.0,
    )
    heads = {"num_heads": 4, "num_kv_heads": 2}
    found, our_loss, our_gradients = ours(model, from_torch_names(weights, **heads), tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(our_loss, loss, rtol=1e-5)
    expected = from_torch_names(gradients, **heads)
    assert our_gradients.keys() == expected.keys()
    for name, gradient in our_gradients.items():
        np.testing.assert_allclose(
            gradient, expected[name], rtol=1e-4, atol=1e-4 * np.abs(expected[name]).max(),
            err_msg=name,
        )  # fmt: skip
