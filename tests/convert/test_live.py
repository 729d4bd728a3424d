"""Against transformers itself, with its own files: both ways, logits equal. Needs torch."""

import jax
import numpy as np
import pytest

from lmjax.convert.exports import export_folder
from lmjax.convert.imports import import_folder
from lmjax.generate.language_model import load
from lmjax.ops.losses import logits
from tests.convert import folders
from tests.convert.test_convert import read_shards

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", folders.CONFIGS)
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path, family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = folders.CONFIGS[family]
    donor = folders.write(tmp_path / "donor", config, folders.drawn(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(donor, dtype=torch.float32)
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    tokenizer = transformers.AutoTokenizer.from_pretrained(donor)
    tokenizer.save_pretrained(tmp_path / "in")
    tokens = np.random.default_rng(0).integers(0, folders.VOCAB, (2, 20))
    with torch.no_grad():
        expected = model(torch.as_tensor(tokens)).logits.numpy()

    import_folder(tmp_path / "in", tmp_path / "run")
    lm = load(tmp_path / "run")
    output = jax.jit(lm.model.apply)(lm.variables, tokens)
    found = logits(output.hidden_BTD, output.unembedding)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    export_folder(tmp_path / "run", tmp_path / "out")
    given, written = read_shards(tmp_path / "in"), read_shards(tmp_path / "out")
    assert given.keys() == written.keys()
    assert all(given[name].tobytes() == written[name].tobytes() for name in given)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = again(torch.as_tensor(tokens)).logits.numpy()
    np.testing.assert_array_equal(found, expected)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reader.encode("To be, or not") == tokenizer.encode("To be, or not")
    assert reader.eos_token == folders.END
