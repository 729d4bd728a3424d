"""Generation agrees with Hugging Face transformers: processors, padded batches, beam search."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from lmjax.generate.beam import BeamSearch
from lmjax.generate.decode import Decoding
from lmjax.generate.sample import Sampling, filtered, penalised
from lmjax.models.gpt import gpt
from tests.generate import transformers_reference as reference


@pytest.fixture(scope="module")
def stored():
    with np.load(reference.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def decoding():
    return Decoding(gpt(**reference.MODEL), smallest_cache=16)


@pytest.fixture(scope="module")
def search(decoding):
    return BeamSearch(decoding)


def variables_of(weights):
    return {"params": unflatten_dict({tuple(k.split("/")): jnp.asarray(x) for k, x in weights})}


@pytest.fixture(scope="module")
def variables(stored):
    return variables_of(
        (k.removeprefix("weights/"), x) for k, x in stored.items() if k.startswith("weights/")
    )


def processed(logits, seen, settings):
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    how = Sampling(**dict(zip(names, settings, strict=True))).arrays()
    mask = np.zeros(logits.shape, bool)
    np.put_along_axis(mask, seen, True, axis=1)
    return filtered(penalised(logits, mask, how["repetition_penalty"]) / how["temperature"], how)


def check_beams(search, variables, prompt, case, texts, scores):
    num_beams, max_tokens, length_penalty, end_id = case
    found = search.search(
        variables,
        prompt,
        num_beams=num_beams,
        max_tokens=max_tokens,
        length_penalty=length_penalty,
        end_ids=[end_id],
    )
    assert [list(one.tokens) for one in found] == [[t for t in row if t >= 0] for row in texts]
    np.testing.assert_allclose([one.score for one in found], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", range(len(reference.SETTINGS)))
def test_processors(stored, number):
    made = processed(stored["logits"], stored["seen"], reference.SETTINGS[number])
    np.testing.assert_allclose(made, stored["processed"][number], rtol=1e-5, atol=1e-6)


def test_greedy_texts_of_padded_prompts(stored, decoding, variables):
    texts = [[], [], [], []]
    for row, token in decoding.batch(
        variables,
        reference.prompts(),
        max_tokens=reference.MAX_TOKENS,
        seeds=[0] * 4,
        temperature=0.0,
    ):
        texts[row].append(token)
    assert texts == stored["greedy"].tolist()


def test_repetition_penalty(stored, decoding, variables):
    found = decoding.tokens(
        variables,
        reference.prompts()[1],
        max_tokens=reference.MAX_TOKENS,
        temperature=0.0,
        repetition_penalty=reference.PENALTY,
    )
    assert list(found) == stored["penalised"][0].tolist() != stored["greedy"][1].tolist()


@pytest.mark.parametrize("number", range(len(reference.BEAMS)))
def test_beam_search(stored, search, variables, number):
    check_beams(
        search,
        variables,
        reference.prompts()[number % 4],
        reference.BEAMS[number],
        stored[f"beams_{number}"],
        stored[f"scores_{number}"],
    )


@pytest.mark.slow
def test_live(search):
    """Other logits, another model and other prompts than the stored ones."""
    pytest.importorskip("transformers")
    random = np.random.default_rng(5)
    logits = (3 * random.normal(size=(64, 200))).astype(np.float32)
    seen = random.integers(0, 200, (64, 30))
    for settings in reference.SETTINGS:
        np.testing.assert_allclose(
            processed(logits, seen, settings),
            reference.processed_logits(logits, seen, settings),
            rtol=1e-5,
            atol=1e-6,
        )
    model = reference.small_model(5)
    variables = variables_of(reference.our_weights(model).items())
    for case in reference.BEAMS:
        prompt = random.integers(0, 20, 5).tolist()
        check_beams(search, variables, prompt, case, *reference.beams(model, prompt, *case))
