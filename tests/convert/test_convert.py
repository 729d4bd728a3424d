"""Weights of Hugging Face's in and out: equal to the bit, by names, shapes and dtypes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lmjax.convert.exports import export_folder
from lmjax.convert.imports import import_folder
from lmjax.engine.stored import find, verify
from tests.convert import folders


def stored_arrays(workdir):
    (stored,) = find(workdir)
    paths = stored.manifest()["arrays"]
    return {p.removeprefix("params/"): np.asarray(stored.array(p).read().result()) for p in paths}


def read_shards(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt2", np.float32),
        ("llama", np.float32),
        pytest.param("llama", np.float16, marks=pytest.mark.slow),
        ("tied", folders.BF16),
        ("mixtral", np.float32),
        ("mistral", np.float32),
        ("qwen2", np.float32),
        ("qwen3", np.float32),
        ("qwen2_moe", np.float32),
        ("qwen3_moe", np.float32),
        ("gemma2", np.float32),
        ("gemma3", np.float32),
    ],
)
def test_import_is_the_mapping_and_export_is_its_inverse(tmp_path, family, dtype):
    config = folders.CONFIGS[family]
    weights = folders.drawn(config, dtype)
    source = folders.write(tmp_path / "in", config, weights, num_shards=3)
    import_folder(source, tmp_path / "run")
    found, wanted = stored_arrays(tmp_path / "run"), folders.ours(config, weights)
    assert found.keys() == wanted.keys()
    for path, array in found.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, wanted[path], err_msg=path)
    (stored,) = find(tmp_path / "run")
    assert verify(stored) == []
    export_folder(tmp_path / "run", tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    back = read_shards(tmp_path / "out")
    assert back.keys() == weights.keys()
    for name, array in back.items():
        assert (array.dtype, array.shape) == (weights[name].dtype, weights[name].shape)
        assert array.tobytes() == weights[name].tobytes(), name
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: again[k] for k in config if not k.startswith("rope")} == {
        k: v for k, v in config.items() if not k.startswith("rope")
    }
