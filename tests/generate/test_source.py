"""Texts of an encoder-decoder: cached, in batches of unequal sources, searched, and in words."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.tokenizer import ByteTokenizer
from lmjax.errors import UserError
from lmjax.generate.beam import BeamSearch
from lmjax.generate.decode import Decoding
from lmjax.generate.language_model import LanguageModel
from lmjax.models.t5 import t5
from lmjax.ops.losses import logits
from tests.models.test_llama import abstract_params

SIZES = {
    "num_layers": 1,
    "dim": 16,
    "num_heads": 2,
    "head_dim": 8,
    "hidden": 24,
    "max_length": 64,
    "num_buckets": 4,
    "max_distance": 6,
}
SOURCES = ([3, 1, 4, 1, 5, 9, 2], [6, 5], list(range(40)))


def made(vocab_size):
    model, random = t5(**SIZES, vocab_size=vocab_size), np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.4 * random.normal(size=x.shape), "f4")  # noqa: E731
    return model, {"params": jax.tree.map(draw, abstract_params(model))}


@pytest.fixture(scope="module")
def whole():
    """(model, variables, (source, text) -> logits after each token of the text, start first)."""
    model, variables = made(41)

    @jax.jit
    def run(source_1M, segments_1M, tokens_1T):
        given = {"source_BM": source_1M, "source_segments_BM": segments_1M}
        output = model.apply(variables, tokens_1T, **given)
        return logits(output.hidden_BTD, output.unembedding)[0]

    def scores(source, text):
        row = np.zeros((3, 1, 64), np.int32)
        row[0, 0, : len(source)], row[1, 0, : len(source)] = source, 1
        row[2, 0, : len(text) + 1] = [model.start_id, *text]
        return run(*row)[: len(text) + 1]

    return model, variables, scores


def greedy(scores, source, count):
    """The plainest way: the whole text again for every token."""
    text = []
    for _ in range(count):
        text.append(int(np.argmax(scores(source, text)[-1])))
    return text


def test_a_text_is_that_of_the_whole_model(whole):
    """Greedy and cached, of two sources of unequal lengths."""
    model, variables, scores = whole
    sources, texts = SOURCES[:2], [[], []]
    how = {"max_tokens": 6, "temperature": 0.0}
    for row, token in Decoding(model).batch(variables, sources, seeds=[0, 0], **how):
        texts[row].append(token)
    assert texts == [greedy(scores, source, 6) for source in sources]


@pytest.mark.slow
def test_texts_of_unequal_sources_are_those_of_the_whole_model(whole):
    """Greedy and cached, alone and in a batch, across the buckets of the cache."""
    model, variables, scores = whole
    decoding, texts = Decoding(model, smallest_cache=8), [[] for _ in SOURCES]
    how = {"max_tokens": 20, "temperature": 0.0}
    for row, token in decoding.batch(variables, SOURCES, seeds=[0] * 3, **how):
        texts[row].append(token)
    assert texts == [greedy(scores, source, 20) for source in SOURCES]
    assert list(decoding.tokens(variables, SOURCES[1], **how)) == texts[1]
    end = texts[1][3]
    cut = texts[1][: texts[1].index(end)]
    assert list(decoding.tokens(variables, SOURCES[1], end_ids=(end,), **how)) == cut


@pytest.mark.slow
def test_search_finds_what_trying_all_finds():
    """All texts of three tokens out of 4, and the probabilities that the whole model gives them."""
    model, variables = made(4)
    search = BeamSearch(Decoding(model, smallest_cache=2))
    found = search.search(variables, [3, 1], num_beams=64, max_tokens=3, length_penalty=0.0)
    texts = np.array(list(itertools.product(range(4), repeat=3)))
    source = np.tile([3, 1], (64, 1))
    tokens = np.pad(texts[:, :2], ((0, 0), (1, 0)))
    output = jax.jit(model.apply)(variables, tokens, source_BM=source)
    each = jax.nn.log_softmax(logits(output.hidden_BTD, output.unembedding), axis=-1)
    totals = np.take_along_axis(np.asarray(each), texts[..., None], axis=-1).sum((1, 2))
    best = np.argsort(-totals)
    np.testing.assert_allclose([one.score for one in found], totals[best], rtol=1e-4)
    assert [one.tokens for one in found[:5]] == [tuple(texts[i].tolist()) for i in best[:5]]


@pytest.mark.slow
def test_the_prompt_is_no_part_of_the_text():
    """The first word keeps its place, and a stop string ends what is written, not what was read."""
    model, variables = made(257)
    lm = LanguageModel(
        model=model,
        variables=variables,
        tokenizer=ByteTokenizer(),
        decoding=Decoding(model),
        step=0,
    )
    text = lm.generate("a source", max_tokens=12, temperature=0.0)
    ids = list(
        lm.decoding.tokens(
            variables, list(b"a source"), max_tokens=12, temperature=0.0, end_ids=[256]
        )
    )
    assert text == ByteTokenizer().decode(ids) and lm.reads_source
    cut = lm.generate("a source", max_tokens=12, temperature=0.0, stop=[text[2:4], "source"])
    assert cut == text[: text.index(text[2:4])]
    assert lm.generate_batch(["a source", "b"], max_tokens=12, temperature=0.0)[0] == text
    with pytest.raises(UserError, match="an encoder-decoder, which writes a text of a source"):
        lm.logits("a text")


@pytest.mark.parametrize(
    ("source", "max_tokens", "message"),
    [
        ([1] * 65, 5, "the prompt has 65 tokens, and an encoder-decoder reads it whole"),
        ([1], 65, "max_tokens is 65, and the texts of an encoder-decoder end within"),
        ([], 5, "the prompt is empty"),
    ],
)
def test_what_does_not_fit_is_refused(whole, source, max_tokens, message):
    model, variables, _ = whole
    decoding = Decoding(model)
    with pytest.raises(UserError, match=message):
        next(decoding.tokens(variables, source, max_tokens=max_tokens))
    with pytest.raises(UserError, match=message):
        BeamSearch(decoding).search(variables, source, num_beams=2, max_tokens=max_tokens)
