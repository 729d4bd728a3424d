"""Beam search finds what a plain search of the same width finds, and a wide one the very best."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.generate.beam import BeamSearch
from lmjax.generate.decode import Decoding
from lmjax.models.gpt import gpt
from lmjax.ops.losses import logits
from lmjax.sharding import unbox

V, END, LENGTH = 5, 2, 24


@pytest.fixture(scope="module")
def model():
    return gpt(num_layers=1, dim=16, num_heads=2, vocab_size=V, max_length=LENGTH)


@pytest.fixture(scope="module")
def variables(model):
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    return jax.tree.map(lambda x: 20 * x, params)


@pytest.fixture(scope="module")
def search(model):
    return BeamSearch(Decoding(model, smallest_cache=8))


@pytest.fixture(scope="module")
def next_log_probs(model, variables):
    """tokens -> log-probabilities [V] of the next one, from the whole text each time."""

    @jax.jit
    def run(tokens_1T):
        output = model.apply(variables, tokens_1T)
        return jax.nn.log_softmax(logits(output.hidden_BTD, output.unembedding)[0])

    def of(tokens):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(run(row))[len(tokens) - 1]

    return of


def plain_search(next_log_probs, prompt, *, num_beams, max_tokens, length_penalty):
    """All kept ends of a search that never stops early, best first: [(text, score)]."""
    beams, kept = [((), 0.0)], []
    for length in range(1, max_tokens + 1):
        found = [
            ((*text, token), total + float(next_log_probs([*prompt, *text])[token]))
            for text, total in beams
            for token in range(V)
        ]
        found = sorted(found, key=lambda one: -one[1])[: 2 * num_beams]
        for text, total in found[:num_beams]:
            if text[-1] == END or length == max_tokens:
                tokens = text[:-1] if text[-1] == END else text
                kept.append((tokens, total / length**length_penalty))
        beams = [one for one in found if one[0][-1] != END][:num_beams]
    return sorted(kept, key=lambda one: -one[1])[:num_beams]


def check(found, expected):
    assert [one.tokens for one in found] == [tokens for tokens, _ in expected]
    scores = [score for _, score in expected]
    np.testing.assert_allclose([one.score for one in found], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.7])
def test_a_wide_search_finds_the_best_of_all_texts(
    search, variables, next_log_probs, length_penalty
):
    """Every text of up to three tokens, scored one by one."""
    prompt, texts = [1, 4], []
    others = [token for token in range(V) if token != END]
    for length in (1, 2, 3):
        for text in itertools.product(others, repeat=length - 1):
            texts += [(*text, END)] + ([(*text, t) for t in others] if length == 3 else [])
    scored = []
    for text in texts:
        total = sum(next_log_probs([*prompt, *text[:i]])[t] for i, t in enumerate(text))
        tokens = text[:-1] if text[-1] == END else text
        scored.append((tokens, float(total) / len(text) ** length_penalty))
    scored.sort(key=lambda one: -one[1])
    found = search.search(
        variables,
        prompt,
        num_beams=90,
        max_tokens=3,
        length_penalty=length_penalty,
        end_ids=[END],
    )
    assert len(found) == len(scored) == 85
    check(found[:10], scored[:10])


@pytest.mark.parametrize("prompt", [[0], [3, 1, 4], [1] * 9])
@pytest.mark.parametrize("length_penalty", [0.0, 1.5, -1.0])
def test_a_narrow_search_is_the_plain_one(
    search, variables, next_log_probs, prompt, length_penalty
):
    """Stopping early changes nothing; the cache grows on the way."""
    how = {"num_beams": 3, "max_tokens": 12, "length_penalty": length_penalty}
    found = search.search(variables, prompt, end_ids=[END], **how)
    check(found, plain_search(next_log_probs, prompt, **how))


@pytest.mark.slow
def test_one_beam_is_greedy(search, variables):
    greedy = search.decoding.tokens(variables, [3], max_tokens=10, temperature=0.0)
    (found,) = search.search(variables, [3], num_beams=1, max_tokens=10)
    assert list(found.tokens) == list(greedy)


def test_a_text_may_end_in_another_way(search, variables):
    """As by a stop string: here where a token comes twice in a row."""

    def twice(tokens):
        return len(tokens) > 1 and tokens[-1] == tokens[-2]

    found = search.search(variables, [3], num_beams=3, max_tokens=10, ended=twice)
    for one in found:
        assert len(one.tokens) == 10 or twice(one.tokens)
        assert not any(twice(one.tokens[:i]) for i in range(len(one.tokens)))
    assert any(len(one.tokens) < 10 for one in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0: must be from 1"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [5]}, "token 5, beyond the vocabulary of 5"),
        ({"max_tokens": 24}, "context of 24.*set max_tokens to 23"),
    ],
)
def test_bad_input(search, variables, change, message):
    how = {"prompt": [1], "num_beams": 3, "max_tokens": 4, **change}
    with pytest.raises(UserError, match=message):
        search.search(variables, how.pop("prompt"), **how)
