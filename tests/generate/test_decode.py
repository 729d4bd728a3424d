"""Cached decoding equals the full forward pass, at every length and across buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.generate.decode import Decoding, grow
from lmjax.models.gemma import gemma
from lmjax.models.gpt import gpt
from lmjax.ops.losses import logits
from lmjax.sharding import unbox


@pytest.fixture(scope="module")
def model():
    return gpt(num_layers=2, dim=32, num_heads=4, vocab_size=50, max_length=96, vocab_multiple=64)


@pytest.fixture(scope="module")
def variables(model):
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    return jax.tree.map(lambda x: 8 * x, params)  # far from uniform, so that a slip is seen


@pytest.fixture(scope="module")
def decoding(model):
    return Decoding(model, smallest_cache=32)


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


@pytest.fixture(scope="module")
def cached(model, variables):
    """(tokens, cache) -> their logits and the cache with them."""

    @jax.jit
    def run(tokens_BT, cache):
        output = model.apply(variables, tokens_BT, cache=cache)
        return logits(output.hidden_BTD, output.unembedding), output.cache

    return run


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 5, 31, 32, 33])
def test_cached_logits_equal_full_forward(model, full, cached, split):
    """A prompt in one piece, the rest token by token, the cache growing from 40 to 64 slots."""
    tokens = np.random.default_rng(0).integers(0, 50, (2, 48)).astype(np.int32)
    first, cache = cached(tokens[:, :split], model.init_cache(2, 40))
    found = [first]
    for t in range(split, 48):
        if t == 40:
            cache = grow(cache, 64)
        one, cache = cached(tokens[:, t : t + 1], cache)
        found.append(one)
    np.testing.assert_allclose(
        jnp.concatenate(found, axis=1)[..., :50], full(tokens)[..., :50], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 60])
def test_greedy_text_equals_the_plainest_decoder(decoding, variables, full, length):
    prompt = np.random.default_rng(length).integers(0, 50, length)
    found = list(decoding.tokens(variables, prompt, max_tokens=36, temperature=0.0))
    assert found == greedy(full, prompt, 36)


def test_text_longer_than_the_context_goes_on_from_its_later_half(decoding, variables, full):
    prompt = np.arange(10)
    found = list(decoding.tokens(variables, prompt, max_tokens=150, temperature=0.0))
    assert len(found) == 150
    text = [*prompt, *found]
    assert found[:87] == greedy(full, prompt, 87)  # token 97 is the last that sees all 96
    assert text[97] == greedy(full, text[49:97], 1)[0]


PROMPTS = [[3], list(range(40)), [7, 7, 9, 1, 0], list(range(20, 50)), [11, 2]]


def together(decoding, variables, prompts, **arguments):
    texts = [[] for _ in prompts]
    for row, token in decoding.batch(variables, prompts, **arguments):
        texts[row].append(token)
    return texts


def test_a_bucket_is_compiled_once(decoding, variables):
    """Other prompts, seeds and settings in the buckets of one row and of eight compile nothing."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def run(*sizes, **settings):
        prompts = [range(size) for size in sizes]
        list(decoding.batch(variables, prompts, max_tokens=8, seeds=[*sizes], **settings))

    run(3), run(3, 9, 40, 1, 5)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(9, top_k=5), run(20, temperature=0.0, repetition_penalty=1.5)
        run(1, 2, 35, 4, 7, 20, min_p=0.1), run(40, 39, 38, 37, 36, 35, 34, 33, top_p=0.5)
        assert not compiled
        jax.jit(lambda x: x + 5)(np.float32(1))
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 20, "min_p": 0.01}])
def test_rows_of_a_batch_are_what_they_are_alone(decoding, variables, settings):
    """Five unequal prompts, through two caches and past the context, until rows end."""
    seeds = [5, 6, 7, 5, 8]
    settings = {"max_tokens": 90, "repetition_penalty": 1.2, **settings}
    alone = [
        list(decoding.tokens(variables, prompt, seed=seed, **settings))
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together(decoding, variables, PROMPTS, seeds=seeds, **settings) == alone
    end = alone[2][30]
    ended = [text[: text.index(end)] if end in text else text for text in alone]
    assert min(map(len, ended)) <= 30
    found = together(decoding, variables, PROMPTS, seeds=seeds, end_ids=[end], **settings)
    assert found == ended


def test_a_row_that_wants_no_more_leaves_the_others_alone(decoding, variables):
    arguments = {"max_tokens": 12, "seeds": [0] * 5, "temperature": 0.0}
    whole = together(decoding, variables, PROMPTS, **arguments)
    done, texts = set(), [[] for _ in PROMPTS]
    for row, token in decoding.batch(variables, PROMPTS, done=done, **arguments):
        texts[row].append(token)
        if len(texts[0]) == 3:
            done.add(0)
    assert texts == [whole[0][:3], *whole[1:]]


@pytest.mark.slow
def test_rotations_and_windows_of_padded_rows():
    """The shorter row's text grows past the window too."""
    model = gemma(
        num_layers=2,
        dim=32,
        num_heads=4,
        num_kv_heads=2,
        hidden=48,
        vocab_size=50,
        max_length=64,
        window=8,
        window_layers=(True, False),
        window_rope_theta=100.0,
        qk_norm=True,
    )
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(1), jnp.zeros((1, 4), jnp.int32)))
    random = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: jnp.float32(0.2 * random.normal(size=x.shape)), shapes)
    decoding, prompts = Decoding(model), [PROMPTS[2], PROMPTS[3]]
    settings = {"max_tokens": 20, "temperature": 0.0}
    alone = [list(decoding.tokens(variables, prompt, **settings)) for prompt in prompts]
    assert together(decoding, variables, prompts, seeds=[0, 0], **settings) == alone
    assert alone[0] != alone[1]


def test_the_same_seed_gives_the_same_text(decoding, variables):
    def draw(seed):
        return list(decoding.tokens(variables, [1, 2], max_tokens=20, temperature=1.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_stops_at_the_end_of_a_document(decoding, variables):
    whole = list(decoding.tokens(variables, [3], max_tokens=20, temperature=0.0))
    end = whole[7]
    stopped = list(decoding.tokens(variables, [3], max_tokens=20, temperature=0.0, end_ids=[end]))
    assert stopped == whole[: whole.index(end)]


@pytest.mark.parametrize(
    ("prompt", "change", "message"),
    [
        ([], {}, "prompt is empty"),
        ([50], {}, "beyond the vocabulary of 50"),
        ([1], {"temperature": -1.0}, "temperature is -1.0: must be 0"),
        ([1], {"temperature": float("inf")}, "temperature is inf"),
        ([1], {"top_k": 2**31}, "top_k is 2147483648"),
        ([1], {"seed": 2**64}, "seed is 18446744073709551616: must be from 0"),
    ],
)
def test_bad_input(decoding, variables, prompt, change, message):
    with pytest.raises(UserError, match=message):
        list(decoding.tokens(variables, prompt, max_tokens=5, **change))
