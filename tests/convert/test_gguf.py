"""GGUF: blocks by hand, files there and back, and what the reference library reads and writes."""

import json
import struct

import jax
import numpy as np
import pytest

from lmjax.convert import gguf_llama
from lmjax.convert.exports import export_folder
from lmjax.convert.gguf import dequantize, quantize_q8_0, read_gguf
from lmjax.convert.imports import import_folder
from lmjax.convert.weights import open_weights
from lmjax.errors import UserError
from lmjax.generate.language_model import load
from lmjax.ops.losses import logits
from tests.convert import folders
from tests.convert.folders import LLAMA
from tests.convert.test_convert import stored_arrays

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    import_folder(folders.write(folder / "in", LLAMA, folders.drawn(LLAMA)), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def file(workdir):
    return export_folder(workdir, workdir.parent / "f32.gguf")[0]


def block_of(kind, scale, numbers, least=None):
    """One block, packed by hand: element j with j + 16 in one byte where they have four bits."""
    data = np.float16(scale).tobytes() + (b"" if least is None else np.float16(least).tobytes())
    if kind == "Q8_0":
        return data + struct.pack("32b", *numbers)
    return data + bytes(numbers[j] | numbers[j + 16] << 4 for j in range(16))


def test_blocks_by_hand():
    random = np.random.default_rng(0)
    fours = [int(n) for n in random.integers(0, 16, 32)]
    eights = [int(n) for n in random.integers(-128, 128, 32)]
    for kind, numbers, least, expected in (
        ("Q4_0", fours, None, [0.5 * (n - 8) for n in fours]),
        ("Q4_1", fours, -1.25, [0.5 * n - 1.25 for n in fours]),
        ("Q8_0", eights, None, [0.5 * n for n in eights]),
    ):
        data = np.frombuffer(block_of(kind, 0.5, numbers, least), np.uint8)
        np.testing.assert_array_equal(dequantize(data, KINDS[kind]), np.float32(expected))


def test_q8_0_rounds_to_the_nearest_of_255_steps():
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    x[2] = 0
    found = dequantize(quantize_q8_0(x), KINDS["Q8_0"]).reshape(x.shape)
    step = np.abs(x.reshape(4, 2, 32)).max(-1, keepdims=True) / 127
    error = np.abs(found - x).reshape(4, 2, 32)
    assert np.all(error <= step * (0.5 + 127 * 2**-11) + 1e-12)  # float16 rounds the step
    assert not found[2].any() and error.max() > 0


def test_there_and_back(workdir, file, tmp_path):
    """Bit for bit, the settings and the tokenizer too."""
    import_folder(file, tmp_path / "run")
    found, wanted = stored_arrays(tmp_path / "run"), stored_arrays(workdir)
    assert found.keys() == wanted.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, wanted[path], err_msg=path)
    models = [json.loads((w / "config.json").read_text()) for w in (workdir, tmp_path / "run")]
    assert models[0] == models[1]
    before, after = load(workdir).tokenizer, load(tmp_path / "run").tokenizer
    text = "To be, or not to be: é € 𝄞\n\t 12"
    np.testing.assert_array_equal(after.encode(text), before.encode(text))
    assert (after.decode(after.encode(text)), after.end_id) == (text, before.end_id)


def test_rows_of_queries_and_keys_are_turned_by_neighbours(file):
    """In the file the pair (i, i + K/2) of each head lies at 2 i and 2 i + 1."""
    _, tensors = read_gguf(file)
    q = folders.drawn(LLAMA)["model.layers.1.self_attn.q_proj.weight"].reshape(4, 8, 32)
    found = tensors["blk.1.attn_q.weight"].rows(0, 32).reshape(4, 8, 32)
    np.testing.assert_array_equal(found[:, 0::2], q[:, :4])
    np.testing.assert_array_equal(found[:, 1::2], q[:, 4:])
    v = folders.drawn(LLAMA)["model.layers.1.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"].rows(0, 16), v)


def test_q8_0_of_a_whole_model(workdir, tmp_path):
    (path,) = export_folder(workdir, tmp_path / "q8.gguf", dtype="q8_0")
    _, tensors = read_gguf(path)
    assert {t.kind for t in tensors.values() if len(t.shape) == 1} == {0}
    weights, _ = open_weights(path)
    wanted = stored_arrays(workdir)
    for name in ("blocks/block/mlp/gate/kernel", "embed/table"):
        found = np.concatenate([b for _, b in weights.blocks(name)])
        np.testing.assert_allclose(found, wanted[name], atol=np.abs(wanted[name]).max() / 250)
        assert np.any(found != wanted[name])


@pytest.mark.parametrize("length", [0, 3, 20, 200, 5000, -40])
def test_truncated_files(file, tmp_path, length):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"is truncated: its tensor|is no whole GGUF file"):
        open_weights(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\3", b"GGUF\1", "GGUF version 1"),
        (b"llama.block_count", b"llama.block_kount", "llama.block_count is None"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_z.weight", "lacks 'blk.0.attn_q.weight'"),
        (b"GGUF", b"GGML", "begins with b'GGML'"),
    ],
)
def test_damaged_files(file, tmp_path, old, new, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        open_weights(path)


def test_what_gguf_cannot_hold_is_refused(tmp_path, file):
    source = folders.write(tmp_path / "in", folders.GPT2, folders.drawn(folders.GPT2))
    import_folder(source, tmp_path / "run")
    with pytest.raises(UserError, match="the model is a gpt2, and only llama"):
        export_folder(tmp_path / "run", tmp_path / "out.gguf")
    with pytest.raises(UserError, match="exists already"):
        export_folder(tmp_path / "run", file)


def test_an_unknown_cut_into_words_is_refused(file):
    fields, _ = read_gguf(file)
    with pytest.raises(UserError, match=r"pre is 'viking', .* --tokenizer=DIR"):
        gguf_llama.read_vocabulary("x", {**fields, "tokenizer.ggml.pre": "viking"})


@pytest.mark.slow
def test_the_reference_library_reads_and_writes_the_same(file, tmp_path):
    gguf = pytest.importorskip("gguf")
    reader, (fields, tensors) = gguf.GGUFReader(file), read_gguf(file)
    assert {t.name for t in reader.tensors} == tensors.keys()
    for t in reader.tensors:
        mine = tensors[t.name].rows(0, tensors[t.name].shape[0])
        np.testing.assert_array_equal(np.asarray(t.data).reshape(mine.shape), mine)
    assert reader.get_field("llama.block_count").contents() == fields["llama.block_count"]
    x = np.random.default_rng(0).normal(size=(8, 96)).astype(np.float32)
    for name, kind in KINDS.items():
        theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
        expected = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(dequantize(theirs.reshape(-1), kind), expected.reshape(-1))
        if name == "Q8_0":
            np.testing.assert_array_equal(quantize_q8_0(x), theirs.reshape(-1))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("q8_0", 0.2)])
def test_llama_cpp_loads_it(workdir, tmp_path, dtype, tolerance):
    """Log-probabilities of a text, as llama.cpp finds them with our file."""
    from tests.convert.llama_cpp import log_probabilities

    pytest.importorskip("xllamacpp")
    (path,) = export_folder(workdir, tmp_path / "model.gguf", dtype=dtype)
    lm = load(workdir)
    text = "To be"  # whose likeliest token is a letter: half a character has no probabilities there
    tokens = lm.tokenizer.encode(text)
    output = jax.jit(lm.model.apply)(lm.variables, tokens[None])
    ours = jax.nn.log_softmax(logits(output.hidden_BTD, output.unembedding)[0])
    found = log_probabilities(path, text)  # of the token after the text
    for token, value in found.items():
        assert value == pytest.approx(float(ours[-1, token]), abs=tolerance)
    assert len(found) == 20
