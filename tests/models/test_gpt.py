"""GPT-2 and GPT-3: sizes, initialisation, and agreement with an independent GPT-2."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.models.gpt import gpt, gpt2, gpt3
from lmjax.ops.losses import logits
from lmjax.sharding import unbox
from lmjax.tasks.causal_lm import CausalLM
from tests.models.gpt2_reference import from_torch_names, loss_and_gradients

SMALL = {"num_layers": 2, "dim": 32, "num_heads": 4, "vocab_size": 50, "max_length": 16}


def abstract_params(model):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens)
    return unbox(variables)["params"]


@pytest.mark.parametrize(
    ("preset", "size", "count"),
    [
        (gpt2, "124m", 124_439_808),
        (gpt2, "355m", 354_823_168),
        (gpt2, "774m", 774_030_080),
        (gpt2, "1.5b", 1_557_611_200),
        (gpt3, "125m", 125_226_240),
        (gpt3, "175b", 174_604_259_328),
    ],
)
def test_exact_parameter_counts(preset, size, count):
    model = preset(size=size)
    assert sum(CausalLM(model=model).count_params(abstract_params(model)).values()) == count


@pytest.mark.parametrize(
    ("size", "billions"),
    [("350m", 0.35), ("760m", 0.76), ("1.3b", 1.3), ("2.7b", 2.7), ("6.7b", 6.7), ("13b", 13.0)],
)
def test_gpt3_sizes_are_those_of_their_names(size, billions):
    model = gpt3(size=size)
    count = sum(CausalLM(model=model).count_params(abstract_params(model)).values())
    assert count == pytest.approx(billions * 1e9, rel=0.025)


def test_initialisation_is_the_table():
    model = gpt(num_layers=8, dim=128, num_heads=4, vocab_size=1000, max_length=256)
    params = paths_of(unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"])
    std = {name: float(np.std(x)) for name, x in params.items()}
    block = "blocks/block"
    for name, expected in {
        "embed/table": 0.02,
        "positions/table": 0.01,
        f"{block}/attention/qkv/kernel": 0.02,
        f"{block}/mlp/up/kernel": 0.02,
        f"{block}/attention/out/kernel": 0.02 / 4,
        f"{block}/mlp/down/kernel": 0.02 / 4,
    }.items():
        assert std.pop(name) == pytest.approx(expected, rel=0.02), name
    assert set(std.values()) == {0.0}  # the rest are constants
    for name in std:
        assert float(params[name].ravel()[0]) == (1.0 if name.endswith("scale") else 0.0), name


def test_layers_are_initialised_apart():
    params = abstract_params(gpt(**SMALL))
    assert params["blocks"]["block"]["mlp"]["up"]["kernel"].shape == (2, 32, 128)
    made = gpt(**SMALL).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    kernel = unbox(made)["params"]["blocks"]["block"]["mlp"]["up"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "no multiple of num_heads"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dim": 10**9 + 7}, "dim is 1000000007: must be at most 16777216"),
        ({"dim": 2**24 - 3, "num_heads": 2**23}, "no multiple of num_heads"),
        ({"head_dim": 0}, "head_dim is 0"),
    ],
)
def test_wrong_sizes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        gpt(**{**SMALL, **change})


def test_unknown_preset_is_refused():
    with pytest.raises(UserError, match="Did you mean '124m'"):
        gpt2(size="124M")


def test_loss_and_gradients_equal_stored_transformers_reference():
    """A GPT-2 of transformers, 3 layers at random weights; `gpt2_reference` wrote the file."""
    stored = np.load(Path(__file__).parent / "gpt2_reference.npz")
    weights = {k.removeprefix("weight:"): stored[k] for k in stored if k.startswith("weight:")}
    expected = from_torch_names(
        {k.removeprefix("gradient:"): stored[k] for k in stored if k.startswith("gradient:")},
        num_heads=4,
    )
    model = gpt(num_layers=3, dim=32, num_heads=4, vocab_size=61, max_length=24, vocab_multiple=8)
    loss, gradients, found = loss_and_gradients(
        model, from_torch_names(weights, num_heads=4), stored["tokens"]
    )
    np.testing.assert_allclose(loss, stored["loss"], rtol=1e-5)
    np.testing.assert_allclose(found[..., :61], stored["logits"], rtol=1e-4, atol=1e-4)
    assert np.all(np.isneginf(found[..., 61:]))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            gradient / scale, expected[name] / scale, atol=1e-4, err_msg=name
        )


@pytest.mark.slow
def test_124m_equals_live_transformers():
    """GPT-2 124M at transformers' own initialisation: loss and every gradient, context 64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    tokens = np.random.default_rng(0).integers(0, 50257, (2, 64))
    output = reference(torch.tensor(tokens), labels=torch.tensor(tokens))
    output.loss.backward()
    parameters = dict(reference.named_parameters())
    weights = from_torch_names({k: v.detach().numpy() for k, v in parameters.items()}, num_heads=12)
    expected = from_torch_names({k: v.grad.numpy() for k, v in parameters.items()}, num_heads=12)
    model = gpt2(dropout=0.0, vocab_multiple=1)
    loss, gradients, _ = loss_and_gradients(model, weights, tokens)
    np.testing.assert_allclose(loss, output.loss.item(), rtol=1e-4)
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            gradient / scale, expected[name] / scale, atol=1e-4, err_msg=name
        )


def test_logits_of_padding_are_minus_infinity():
    model = gpt(**{**SMALL, "vocab_multiple": 64})
    variables = unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    output = model.apply(variables, jnp.zeros((1, 4), jnp.int32))
    made = logits(output.hidden_BTD, output.unembedding)
    assert np.all(np.isneginf(made[..., 50:])) and np.all(np.isfinite(made[..., :50]))
