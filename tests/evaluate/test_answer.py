"""Requests in batches are answered as each alone would be, in their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.tokenizer import ByteTokenizer, CharacterTokenizer
from lmjax.errors import UserError
from lmjax.evaluate.answer import Answering, Generation
from lmjax.generate.decode import Decoding
from lmjax.generate.language_model import LanguageModel
from lmjax.models.gpt import gpt
from tests.evaluate import toy


def answering(lm, **how):
    return Answering(lm, devices=jax.devices()[:1], **how)


@pytest.fixture(scope="module")
def speaker():
    """A model that can also generate."""
    model = gpt(num_layers=1, dim=16, num_heads=2, vocab_size=257, max_length=32)
    made = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))
    weights = jax.tree.map(lambda x: 8 * x.value, made, is_leaf=lambda x: hasattr(x, "value"))
    return LanguageModel(
        model=model,
        variables=weights,
        tokenizer=ByteTokenizer(),
        decoding=Decoding(model),
        step=0,
    )


def by_hand(variables, before, ids, longest):
    """The log-likelihood of ids after others, cut from the left, and is it greedy."""
    tokens, total, greedy = [*before, *ids], 0.0, True
    first = max(0, len(tokens) - longest - 1)
    for at in range(len(before), len(tokens)):
        rows = toy.logprobs(variables, tokens[first:at])
        total += rows[tokens[at]]
        greedy &= int(rows.argmax()) == tokens[at]
    return total, greedy


def test_loglikelihood_is_that_of_each_request_alone():
    lm = toy.language_model(max_length=30)
    random = np.random.default_rng(1)
    text = "the cat sat on the mat and so on " * 3
    requests = []
    for _ in range(30):
        size, more = int(random.integers(0, 60)), int(random.integers(1, 30))
        requests.append((text[:size].rstrip(), text[size : size + more]))
    best = int(toy.logprobs(lm.variables, list(b"cat")).argmax())
    requests += [("cat", chr(n)) for n in (best % 128, 65, 66)] + [("", "so")]
    found = answering(lm, batch_size=4).loglikelihood(requests)
    greedy = 0
    for (context, continuation), (total, is_greedy) in zip(requests, found, strict=True):
        before = list(context.encode()) or [256]
        expected = by_hand(lm.variables, before, list(continuation.encode()), 30)
        assert total == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
        assert is_greedy == expected[1]
        greedy += is_greedy
    assert greedy == (best < 128)


def test_rolling_scores_every_token_in_disjoint_windows():
    lm = toy.language_model(max_length=9)
    texts = ["", "a", "one two", "123456789", "1234567890", "a longer text of thirty-one byte"]
    found = answering(lm).loglikelihood_rolling(texts)
    for text, total in zip(texts, found, strict=True):
        ids = [256, *text.encode()]
        expected = 0.0
        for start in range(1, len(ids), 9):
            part = ids[start : start + 9]
            expected += by_hand(lm.variables, ids[:start], part, 9)[0]
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_pairs_are_cut_where_the_context_ends(bos):
    tokenizer = toy.merging_tokenizer(bos=bos)
    answers = answering(toy.language_model(tokenizer))
    ids = tokenizer._controlled.get_vocab()
    first = [ids["<s>"]] if bos else []

    def pair(*texts):
        return tuple(part.tolist() for part in answers.encode_pair(*texts))

    space = ids["\u0120"]
    assert pair("c", " a") == ([*first, ids["c"]], [ids["\u0120a"]])
    # Spaces at the end move over, and join what follows.
    assert pair("c ", "a") == ([*first, ids["c"]], [ids["\u0120a"]])
    assert pair("c  ", "b") == ([*first, ids["c"]], [space, space, ids["b"]])
    # The cut is by the number of the context's own tokens, as in the harness.
    assert pair("ca", "b") == ([*first, ids["c"], ids["a"]], [])
    assert pair("c", "ab") == ([*first, ids["c"]], [ids["ab"]])
    # Without a context, the token that begins or ends texts is one.
    assert pair("", "ab") == ([ids["<s>" if bos else "</s>"]], [ids["ab"]])
    if bos:
        assert pair("", "<s>ab") == ([ids["<s>"]], [ids["ab"]])
        assert pair("<s>c", "a") == ([ids["<s>"], ids["c"]], [ids["a"]])  # and never two of them


def test_texts_are_those_of_each_request_alone():
    lm = toy.language_model(max_length=30)
    prompts = ["To be", "that is the question", "", "n", "x" * 60, "To be"]

    def alone(number, max_tokens, temperature):
        ids = list(prompts[number].encode())[-(30 - max_tokens) :] or [256]
        how = {
            "max_tokens": max_tokens,
            "end_ids": [256],
            "temperature": temperature,
            "done": set(),
        }
        found = lm.decoding.batch(lm.weights(1), [ids], seeds=[7 + number], **how)
        return lm.tokenizer.decode([token for _, token in found])

    greedy = [alone(number, 9, 0.0) for number in range(6)]
    drawn = [alone(number, 20, 1.5) for number in range(6)]
    assert len(set(greedy + drawn)) > 8
    stop = greedy[1][3]
    kwargs = {"until": [stop, "\n"], "max_gen_toks": 9}, {"temperature": 1.5, "max_tokens": 20}
    for batch_size in (1, 2, 4):
        answers = answering(lm, batch_size=batch_size, seed=7)
        found = answers.generate_until([(p, kwargs[n % 2]) for n, p in enumerate(prompts)])
        assert found[1::2] == drawn[1::2]
        assert found[::2] == [text.split(stop)[0].split("\n")[0] for text in greedy[::2]]
        (cut,) = answers.generate_until([(prompts[1], kwargs[0])])
        assert cut == greedy[1].split(stop)[0] and len(cut) <= 3


@pytest.mark.slow
def test_drawn_texts_are_those_of_each_request_alone(speaker):
    """Settings of two kinds among each other, and a context without a token."""
    drawn = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 5}
    prompts = ["To be", "that is the question", "n", "\t"]
    requests = [(prompt, drawn) for prompt in prompts]
    requests[2:2] = [("", {"max_gen_toks": 4})]
    found = answering(speaker, batch_size=3, seed=7).generate_until(requests)
    for number, prompt in zip((0, 1, 3, 4), prompts, strict=True):
        how = {"max_tokens": 5, "temperature": 1.5, "top_k": 0, "seed": 7 + number}
        assert found[number] == speaker.generate(prompt, **how)
    begun = speaker.decoding.tokens(
        speaker.variables, [256], max_tokens=4, temperature=0.0, end_ids=[256]
    )
    assert found[2] == speaker.tokenizer.decode(list(begun))


def test_generation_kwargs():
    greedy = Generation.of({"until": "\n", "do_sample": False, "temperature": 0.7})
    assert greedy == Generation(until=("\n",), max_tokens=256, drawing={"temperature": 0.0})
    assert Generation.of({}).drawing == {"temperature": 0.0}
    drawn = Generation.of({"until": ["a", ""], "temperature": 0.5, "top_p": 0.9, "top_k": None})
    assert drawn.until == ("a",) and drawn.drawing == {"temperature": 0.5, "top_p": 0.9}
    assert Generation.of({"do_sample": True}).drawing == {"temperature": 1.0}
    both = {"max_tokens": 3, "max_gen_toks": 4, "num_beams": 1}
    assert Generation.of(both).max_tokens == 4


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        ("loglikelihood", ("a", ""), "has 0 tokens: it must have 1 to 30"),
        ("loglikelihood", ("a", "b" * 31), "has 31 tokens: it must have 1 to 30"),
        ("generate_until", ("a", {"max_gen_toks": 30}), "asks for 30 tokens, and the context of"),
        ("generate_until", ("a", {"temprature": 1}), "Did you mean 'temperature'"),
        ("generate_until", ("a", {"num_beams": 4}), "num_beams 4: lmjax"),
    ],
)
def test_what_cannot_be_answered_is_refused(kind, request_, message):
    answers = answering(toy.language_model(max_length=30))
    with pytest.raises(UserError, match=message):
        getattr(answers, kind)([request_])


def test_a_text_that_cannot_be_spelled_is_named():
    answers = answering(toy.language_model(CharacterTokenizer("abc ")))
    for kind, request in (
        ("loglikelihood", ("a b", "Z")),
        ("loglikelihood_rolling", "a bZ"),
        ("generate_until", ("a bZ", {"max_gen_toks": 3})),
    ):
        requests = [("a", "b") if kind == "loglikelihood" else request, request]
        with pytest.raises(UserError, match=r"request [01] of the task, 'a bZ': the character 'Z'"):
            getattr(answers, kind)(requests)
    with pytest.raises(UserError, match="length is 41: give 1 to 40"):
        answering(toy.language_model(), length=41)
