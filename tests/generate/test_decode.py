"""Cached decoding equals the full forward pass, at every length and across buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.generate.decode import Decoding, grow
from lmjax.generate.sample import sample
from lmjax.models.gpt import gpt
from lmjax.ops.losses import logits
from lmjax.sharding import unbox


@pytest.fixture(scope="module")
def model():
    return gpt(num_layers=2, dim=32, num_heads=4, vocab_size=50, max_length=96, vocab_multiple=64)


@pytest.fixture(scope="module")
def variables(model):
    params = unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    return jax.tree.map(lambda x: 8 * x, params)  # far from uniform, so that a slip is seen


@pytest.fixture(scope="module")
def decoding(model):
    return Decoding(model)


@pytest.fixture(scope="module")
def full(model, variables):
    """tokens -> logits of every position, without a cache."""

    @jax.jit
    def run(tokens_BT):
        output = model.apply(variables, tokens_BT)
        return logits(output.hidden_BTD, output.unembedding)

    return run


def greedy(full, prompt, count):
    """The plainest decoder: the whole text again for every token."""
    text = list(prompt)
    for _ in range(count):
        row = np.zeros((1, 96), np.int32)
        row[0, : len(text)] = text
        text.append(int(np.argmax(full(row)[0, len(text) - 1])))
    return text[len(prompt) :]


@pytest.mark.parametrize("split", [1, 5, 31, 32, 33])
def test_cached_logits_equal_full_forward(model, variables, full, split):
    """A prompt in one piece, the rest token by token, the cache growing from 40 to 64 slots."""
    tokens = np.random.default_rng(0).integers(0, 50, (2, 48)).astype(np.int32)
    expected = full(tokens)
    output = model.apply(variables, tokens[:, :split], cache=model.init_cache(2, 40))
    found = [logits(output.hidden_BTD, output.unembedding)]
    step = jax.jit(lambda cache, token: model.apply(variables, token, cache=cache))
    cache = output.cache
    for t in range(split, 48):
        if t == 40:
            cache = grow(cache, 64)
        output = step(cache, tokens[:, t : t + 1])
        cache = output.cache
        found.append(logits(output.hidden_BTD, output.unembedding))
    np.testing.assert_allclose(
        jnp.concatenate(found, axis=1)[..., :50], expected[..., :50], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 60])
def test_greedy_text_equals_the_plainest_decoder(decoding, variables, full, length):
    prompt = np.random.default_rng(length).integers(0, 50, length)
    found = list(decoding.tokens(variables, prompt, max_tokens=36, temperature=0.0))
    assert found == greedy(full, prompt, 36)


def test_a_bucket_is_compiled_once(model, variables):
    decoding = Decoding(model)
    for length in (3, 9, 20):
        list(decoding.tokens(variables, np.arange(length), max_tokens=10))
    assert decoding._prefill._cache_size() == 1
    assert decoding._next._cache_size() == 1


def test_text_longer_than_the_context_goes_on_from_its_later_half(decoding, variables, full):
    prompt = np.arange(10)
    found = list(decoding.tokens(variables, prompt, max_tokens=150, temperature=0.0))
    assert len(found) == 150
    text = [*prompt, *found]
    assert found[:87] == greedy(full, prompt, 87)  # token 97 is the last that sees all 96
    assert text[97] == greedy(full, text[49:97], 1)[0]


def test_the_same_seed_gives_the_same_text(decoding, variables):
    def draw(seed):
        return list(decoding.tokens(variables, [1, 2], max_tokens=20, temperature=1.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_stops_at_the_end_of_a_document(decoding, variables):
    whole = list(decoding.tokens(variables, [3], max_tokens=20, temperature=0.0))
    end = whole[7]
    stopped = list(decoding.tokens(variables, [3], max_tokens=20, temperature=0.0, end_id=end))
    assert stopped == whole[: whole.index(end)]


def test_sampling_keeps_to_the_top_k_and_follows_the_temperature():
    values = jnp.array([[0.0, 1.0, 2.0, 3.0, -jnp.inf]])
    keys = jax.random.split(jax.random.key(0), 4000)

    def draw(temperature, top_k):
        one = jax.vmap(lambda k: sample(values, k, temperature=temperature, top_k=top_k)[0])
        return np.bincount(one(keys), minlength=5) / len(keys)

    assert draw(jnp.float32(0), jnp.int32(0)).tolist() == [0, 0, 0, 1, 0]
    assert (draw(jnp.float32(1), jnp.int32(2)) > 0).tolist() == [False, False, True, True, False]
    expected = jax.nn.softmax(values[0] / 2)
    # Three standard deviations of a frequency over 4,000 draws are under 0.024.
    np.testing.assert_allclose(draw(jnp.float32(2), jnp.int32(0)), expected, atol=0.024)


@pytest.mark.parametrize(
    ("prompt", "change", "message"),
    [
        ([], {}, "prompt is empty"),
        ([50], {}, "beyond the vocabulary of 50"),
        ([1], {"temperature": -1.0}, "none may be negative"),
        ([1], {"temperature": float("inf")}, "temperature inf"),
        ([1], {"top_k": 2**31}, "or beyond 32 bits"),
        ([1], {"seed": 2**64}, "seed is 18446744073709551616: must be from 0"),
    ],
)
def test_bad_input(decoding, variables, prompt, change, message):
    with pytest.raises(UserError, match=message):
        list(decoding.tokens(variables, prompt, max_tokens=5, **change))
