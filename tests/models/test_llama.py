"""Llama: sizes, initialisation, packing, decoding, and agreement with transformers' Llama."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.core import Decoder
from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.generate.decode import Decoding
from lmjax.models.llama import llama, llama2, llama3
from lmjax.ops.losses import logits
from lmjax.ops.rope import RopeScaling
from lmjax.sharding import unbox
from lmjax.tasks.causal_lm import CausalLM

SMALL = {
    "num_layers": 2,
    "dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden": 48,
    "vocab_size": 50,
    "max_length": 64,
}


def abstract_params(model):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens)
    return unbox(variables)["params"]


def count(model):
    return sum(CausalLM(model=model).count_params(abstract_params(model)).values())


def drawn(model):
    """Variables far enough from uniform that a slip is seen; compiles nothing."""
    random = np.random.default_rng(0)
    draw = lambda x: (0.12 * random.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    return {"params": jax.tree.map(draw, abstract_params(model))}


@pytest.fixture(scope="module")
def model():
    return llama(**SMALL, vocab_multiple=16)


@pytest.fixture(scope="module")
def variables(model):
    return drawn(model)


@pytest.mark.parametrize(
    ("preset", "size", "expected"),
    [
        (llama3, "1b", 1_235_814_400),
        (llama3, "3b", 3_212_749_824),
        (llama3, "8b", 8_030_261_248),
        (llama3, "70b", 70_553_706_496),
        (llama3, "405b", 405_853_388_800),
        (llama2, "7b", 6_738_415_616),
        (llama2, "13b", 13_015_864_320),
    ],
)
def test_exact_parameter_counts(preset, size, expected):
    assert count(preset(size=size)) == expected


def test_given_numbers_stand_in_place_of_the_presets():
    model = llama3(size="8b", num_layers=2, dim=64, num_heads=16, hidden=96, vocab_size=100)
    shapes = {k: v.shape for k, v in paths_of(abstract_params(model)).items()}
    assert shapes["blocks/block/attention/qkv/kernel"] == (2, 64, 8, 4, 4)
    assert shapes["blocks/block/mlp/down/kernel"] == (2, 96, 64)
    assert shapes["unembed/table"] == (128, 64)
    assert model.vocab_size == 100
    with pytest.raises(UserError, match="Did you mean '70b'"):
        llama3(size="70B")


def test_flop_counts_products_and_attention(model):
    """Of one token: two for each weight but the embedding's, 4 T D a layer for attention."""
    products = 2 * (count(model) - 50 * 32 - 5 * 32)  # without the embedding and five norms
    assert model.flop_per_token(16)[1] == products + 2 * 4 * 16 * 32
    assert model.flop_per_token(16)[0] == products + 2 * 4 * 32 * 17 / 2


@pytest.mark.slow
def test_initialisation_is_the_table():
    model = llama(num_layers=8, dim=128, num_heads=4, vocab_size=1000, max_length=16)
    init = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = paths_of(unbox(init)["params"])
    std = {name: float(np.std(x)) for name, x in params.items()}
    for name, expected in {
        "embed/table": 0.02,
        "unembed/table": 0.02,
        "blocks/block/attention/qkv/kernel": 0.02,
        "blocks/block/attention/out/kernel": 0.02 / 4,
        "blocks/block/mlp/gate/kernel": 0.02,
        "blocks/block/mlp/up/kernel": 0.02,
        "blocks/block/mlp/down/kernel": 0.02 / 4,
    }.items():
        assert std.pop(name) == pytest.approx(expected, rel=0.02), name
    assert {name: float(params[name].ravel()[0]) for name in std} == dict.fromkeys(
        ("norm/scale", "blocks/block/attention_norm/scale", "blocks/block/mlp_norm/scale"), 1.0
    )


def test_padding_of_the_vocabulary_has_no_probability(model, variables):
    output = model.apply(variables, jnp.zeros((1, 4), jnp.int32))
    made = logits(output.hidden_BTD, output.unembedding)
    assert made.shape[-1] == 64
    assert np.all(np.isneginf(made[..., 50:])) and np.all(np.isfinite(made[..., :50]))


def test_packed_documents_equal_documents_apart(model, variables):
    random = np.random.default_rng(1)
    first, second = random.integers(0, 50, (1, 9)), random.integers(0, 50, (1, 7))
    run = jax.jit(lambda tokens, **where: model.apply(variables, tokens, **where).hidden_BTD)
    packed = run(
        np.concatenate([first, second], axis=1),
        segments_BT=np.array([[1] * 9 + [2] * 7]),
        positions_BT=np.array([[*range(9), *range(7)]]),
    )
    apart = np.concatenate([run(first), run(second)], axis=1)
    np.testing.assert_allclose(packed, apart, rtol=1e-5, atol=1e-5)
    shifted = run(first, positions_BT=np.arange(9)[None] + 20)
    np.testing.assert_allclose(shifted, run(first), rtol=1e-4, atol=1e-4)  # distances alone count


def test_cached_logits_equal_full_forward(model, variables):
    tokens = np.random.default_rng(0).integers(0, 50, (2, 20)).astype(np.int32)
    run = jax.jit(lambda tokens, cache=None: model.apply(variables, tokens, cache=cache))
    output = run(tokens)
    expected = logits(output.hidden_BTD, output.unembedding)[..., :50]
    output = run(tokens[:, :11], model.init_cache(2, 24))
    found = [logits(output.hidden_BTD, output.unembedding)]
    for t in range(11, 20):
        output = run(tokens[:, t : t + 1], output.cache)
        found.append(logits(output.hidden_BTD, output.unembedding))
    found = jnp.concatenate(found, axis=1)[..., :50]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_decodes(model, variables):
    """Greedy text through the cache is the plainest decoder's."""
    found = list(Decoding(model).tokens(variables, [3, 1, 4], max_tokens=6, temperature=0.0))
    text = [3, 1, 4]
    run = jax.jit(lambda tokens: model.apply(variables, tokens))
    for _ in range(6):
        row = np.zeros((1, 9), np.int32)
        row[0, : len(text)] = text
        output = run(row)
        made = logits(output.hidden_BTD, output.unembedding)
        text.append(int(np.argmax(made[0, len(text) - 1])))
    assert found == text[3:]


def test_is_a_decoder(model):
    decoder: Decoder = model
    assert decoder.max_length == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "choose one of"),
        ({"num_heads": 5, "num_kv_heads": None}, "no multiple of num_heads"),
        ({"hidden": 0}, "hidden is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"head_dim": 7}, "must be even"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 10**9}, "head_dim is 1000000000: must be at most"),
        ({"dim": 0}, "dim is 0"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0: must be at least 1"),
        ({"epsilon": -1.0}, "epsilon is -1.0: must be positive"),
    ],
)
def test_wrong_sizes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        llama(**{**SMALL, **change})


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_equal_transformers(tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.models.llama_reference import from_torch_names, ours, reference

    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={
            **rope, "rope_theta": 500.0, "original_max_position_embeddings": 16
        },
        bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 61, (3, 24))
    weights, expected, loss, gradients = reference(transformers.LlamaForCausalLM(config), tokens)
    model = llama(
        num_layers=3,
        dim=32,
        num_heads=4,
        num_kv_heads=2,
        hidden=48,
        vocab_size=61,
        max_length=64,
        rope_theta=500.0,
        rope_scaling=RopeScaling(factor=8.0, original_length=16),
        tied=tied,
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
