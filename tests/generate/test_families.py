"""Cached decoding of every family equals its full forward pass, at every length of a prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.generate.decode import Decoding
from lmjax.generate.weights import Weights
from lmjax.models.gpt import gpt
from lmjax.models.moe import moe
from lmjax.ops.losses import logits
from lmjax.sharding import unbox
from tests.models.test_families import MODELS, SIZES, WINDOWED, model_of

WINDOW, LONGEST, STEPS = 5, 14, 3
GPT = {"num_layers": 2, "dim": 32, "num_heads": 4, "vocab_size": 37, "max_length": 64}
MIXTRAL = {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 12}
FAMILIES = {
    "gpt2": functools.partial(gpt, **GPT),
    "mixtral": functools.partial(
        moe, **{k: v for k, v in SIZES.items() if k != "hidden"}, **MIXTRAL
    ),
    **{name: functools.partial(model_of, name) for name in MODELS},
}


def drawn(model):
    """Variables far enough from uniform that a slip is seen; compiles nothing."""
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.float32(0.2 * random.normal(size=x.shape)), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_every_length(family):
    """Beside another that is longer or shorter; in windowed families from within it to past it."""
    assert family not in WINDOWED or FAMILIES[family]().stacks[0].block.attention.window == WINDOW
    model = FAMILIES[family]()
    variables, decoding = drawn(model), Decoding(model)
    tokens = np.random.default_rng(1).integers(0, 37, (2, LONGEST + STEPS)).astype(np.int32)

    @jax.jit
    def full(tokens_BT):
        output = model.apply(variables, tokens_BT)
        return logits(output.hidden_BTD, output.unembedding)[..., :37]

    expected = np.asarray(full(tokens))
    read, step = jax.jit(decoding.read, static_argnames="size"), jax.jit(decoding.step)
    for length in range(1, LONGEST + 1):
        lengths = (length, LONGEST + 1 - length)
        rows, begins = decoding.padded([row[:n] for row, n in zip(tokens, lengths, strict=True)], 2)
        found, cache = read(variables, rows, np.int32(max(lengths)), begins, size=32)
        for more in range(STEPS + 1):
            wanted = [expected[row, n - 1 + more] for row, n in enumerate(lengths)]
            np.testing.assert_allclose(found[:, :37], wanted, rtol=1e-4, atol=1e-4)
            if more < STEPS:
                following = np.array([tokens[row, n + more] for row, n in enumerate(lengths)])
                found, cache = step(Weights(variables), cache, following)
