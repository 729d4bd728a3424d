"""Texts translated by a run: averaged checkpoints, texts of all lengths, seeds."""

import pickle

import numpy as np
import pytest

from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.generate.language_model import load
from lmjax.generate.translator import Translator
from tests.generate.translating import ROOM, write_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def test_average_is_the_mean_of_the_newest(workdir):
    one, two, three = (paths_of(load(workdir, step=step).variables) for step in (1, 2, 3))
    last, before = (paths_of(load(workdir, average=2, step=step).variables) for step in (None, 2))
    for path in one:
        np.testing.assert_allclose(last[path], (two[path] + three[path]) / 2, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(before[path], (one[path] + two[path]) / 2, rtol=1e-6, atol=1e-7)
    with pytest.raises(UserError, match="holds 3 checkpoints up to step 3, and the mean of 4"):
        load(workdir, average=4)
    with pytest.raises(UserError, match="average is 0"):
        load(workdir, average=0)


@pytest.mark.slow
def test_a_text_is_translated_alike_alone_and_among_others(workdir):
    translator = pickle.loads(pickle.dumps(Translator(workdir=workdir, average=2)))
    texts = ["abc", "", "  ", "hgfedcba", "a b c."]
    found = translator.translate(texts)
    assert found == [translator(text) for text in texts]
    assert found[1:3] == ["", ""] and all(found[n] for n in (0, 3, 4))
    model = load(workdir, average=2)
    searched = Translator(workdir=workdir, average=2, num_beams=3).translate(texts)
    assert searched[3] == model.search("hgfedcba", num_beams=3, max_tokens=ROOM)[0][0]


@pytest.mark.slow
def test_what_is_drawn_is_a_function_of_text_and_seed(workdir):
    translator = Translator(workdir=workdir, temperature=1.0)
    texts = ["abc", "abc", "hgf"]
    found = translator.translate(texts, seeds=[1, 2, 1])
    assert found[0] != found[1]
    assert translator.translate(texts[::-1], seeds=[1, 2, 1])[::-1][:2] == found[:2]


@pytest.mark.slow
def test_long_texts_go_in_pieces(workdir):
    """Cut between sentences, then words, then anywhere; each piece as if it stood alone."""
    translator = Translator(workdir=workdir)
    sentences = ["abc def gh.", "hgf edc ba.", "aa bb cc dd."]
    assert translator._pieces(" ".join(sentences)) == [sentences[0], " ".join(sentences[1:])]
    words = ["abcdefgh"] * 6
    assert translator._pieces(" ".join(words)) == ["abcdefgh " * 2 + "abcdefgh"] * 2
    assert translator._pieces("a" * 40) == ["a" * 20] * 2
    text = " ".join(sentences)
    pieces = translator._pieces(text)
    assert translator(text) == " ".join(translator.translate(pieces))


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="num_beams is 0"):
        Translator(workdir="runs/x", num_beams=0)
    with pytest.raises(UserError, match="a search draws nothing"):
        Translator(workdir="runs/x", num_beams=2, temperature=1.0)
    with pytest.raises(UserError):
        Translator(workdir=str(tmp_path))("abc")
