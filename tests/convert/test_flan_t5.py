"""A FLAN-T5 small with its published weights: translates, token by token, as transformers does."""

import json

import numpy as np
import pytest

from lmjax.convert.imports import import_folder
from lmjax.generate.beam import BeamSearch
from lmjax.generate.language_model import load
from tests.convert import flan_t5_reference, onnx_t5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    package = flan_t5_reference.package()
    return onnx_t5.write_folder(package, tmp_path_factory.mktemp("flan"))


@pytest.fixture(scope="module")
def lm(folder):
    import_folder(folder, folder / "run")
    return load(folder / "run")


def agrees(lm, expected):
    how = {"max_tokens": flan_t5_reference.MAX_TOKENS, "end_ids": (1,)}
    for one in expected:
        source = lm.tokenizer.encode_prompt(one["prompt"])
        assert source.tolist() == one["source"]
        assert (
            list(lm.decoding.tokens(lm.variables, source, temperature=0.0, **how)) == one["greedy"]
        )
        found = BeamSearch(lm.decoding).search(
            lm.variables, source, num_beams=flan_t5_reference.BEAMS, **how
        )
        assert [list(beam.tokens) for beam in found] == one["beams"]
        scores = [beam.score for beam in found]
        np.testing.assert_allclose(scores, one["scores"], rtol=1e-4)
    texts = lm.generate_batch([one["prompt"] for one in expected], max_tokens=40, temperature=0.0)
    assert texts == [one["text"] for one in expected]


def test_translates_as_the_stored_reference(lm):
    """Greedily and searched, alone and as a batch; ids that `flan_t5_reference` had from torch."""
    stored = json.loads(flan_t5_reference.PATH.read_text())
    assert stored[0]["text"] == "Das Haus ist wunderbar."
    agrees(lm, stored)


@pytest.mark.filterwarnings("default")
def test_translates_as_live_transformers(folder, lm):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    agrees(lm, flan_t5_reference.measure(folder))
