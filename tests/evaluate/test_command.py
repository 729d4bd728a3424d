"""`python -m lmjax.evaluate` on a run: its table, its JSON, and what it refuses."""

import importlib.util
import io
import json
import os
import string
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

import lmjax
from lmjax.data.source import read_documents
from lmjax.errors import UserError
from lmjax.evaluate.held_out import held_out
from lmjax.evaluate.perplexity import perplexity
from lmjax.evaluate.report import check_out, show
from lmjax.evaluate.score import Scorer
from lmjax.generate.language_model import load
from tests.evaluate import tasks

ROOT = Path(__file__).parents[2]

# The command in an environment without torch and what brings it, whatever is installed here.
WITHOUT_TORCH = """
import runpy, sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("torch", "transformers", "accelerate")
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path = [Without if f is PathFinder else f for f in sys.meta_path]
runpy.run_module("lmjax.evaluate", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two steps of the character config on a text of all characters that the facts need."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    line = "To be, or not to be:\nthat is the question. " * 20
    text.write_text((string.printable[:95] + "\n" + line) * 10)
    config = lmjax.load_config(
        f"{ROOT}/configs/char.py:smoke",
        {"steps": 2, "data.path": str(text), "optimizer.learning_rate.warmup_steps": 0},
    )
    lmjax.train(config, str(folder / "run"), quiet=True, devices=jax.devices()[:1])
    return folder / "run"


def run(*flags, code="-m", program="lmjax.evaluate", env=None):
    command = [sys.executable, code, program, *flags]
    environment = {**os.environ, "XLA_FLAGS": "", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_perplexity_of_what_the_run_held_out(workdir, tmp_path):
    out = tmp_path / "made" / "found.json"
    code, printed, error = run(f"--workdir={workdir}", f"--out={out}", "--length=24", "--stride=5")
    assert code == 0, error
    found = json.loads(out.read_text())
    lm = load(workdir)
    scorer = Scorer(lm.model, lm.variables, devices=jax.devices()[:1])
    numbers = perplexity(scorer, lm.tokenizer, held_out(workdir), length=24, stride=5).numbers()
    assert found["results"]["perplexity"] == pytest.approx(numbers, rel=1e-5)
    assert found["step"] == 2 and found["tokenizer"] == lm.tokenizer.hash
    manifest = json.loads((workdir / "checkpoints/2/about/metadata").read_text())
    assert found["checkpoint"] == manifest["sha256"]
    assert found["settings"]["stride"] == 5 and found["versions"]["jax"] == jax.__version__
    assert f"{numbers['bits_per_byte']:.4f}" in printed and "bits_per_byte" in printed

    text = tmp_path / "lines.jsonl"
    text.write_text('{"body": "To be"}\n{"body": "that"}\n{"body": "is"}\n')
    flags = (f"--data={text}", "--text_field=body", "--max_documents=2", "--prefix=bos")
    code, _, error = run(f"--workdir={workdir}", f"--out={out}", *flags, "--step=2")
    assert code == 0, error
    found = json.loads(out.read_text())["results"]["perplexity"]
    documents = read_documents(str(text), text_field="body")[:2]
    numbers = perplexity(scorer, lm.tokenizer, documents, prefix="bos").numbers()
    assert found == pytest.approx(numbers, rel=1e-5) and found["tokens"] == 9


@pytest.mark.slow
def test_what_is_refused(workdir, tmp_path):
    for flags, message in (
        (["--task=perplexity", "--limit=3"], "--limit means nothing to --task=perplexity"),
        (["--stride=500", "--length=8"], "stride is 500: give 1 to 8"),
        (["--data=nowhere.txt"], "no text at 'nowhere.txt'"),
        (["--step=7"], "no checkpoint of step 7"),
        ([f"--out={tmp_path}"], "is a folder: name a file in it"),
        (["--log_samples", "--task=facts"], "--log_samples writes to --out"),
    ):
        code, _, error = run(f"--workdir={workdir}", *flags)
        assert code == 2 and message in error, (flags, error)
    text = tmp_path / "snow.txt"
    text.write_text("To be ☃")
    code, _, error = run(f"--workdir={workdir}", f"--data={text}")
    assert code == 2 and f"{text}: the character '☃'" in error
    if importlib.util.find_spec("lm_eval") is None:
        code, _, error = run(f"--workdir={workdir}", "--task=facts")
        assert code == 2 and "pip install 'lmjax[eval]'" in error


@pytest.mark.slow
def test_tasks_of_the_harness_without_torch(workdir, tmp_path):
    pytest.importorskip("lm_eval")
    tasks.write(tmp_path)
    out = tmp_path / "found.json"
    code, printed, error = run(
        f"--workdir={workdir}",
        "--task=perplexity,facts,facts_rolling",
        f"--task_path={tmp_path}",
        "--limit=6",
        "--log_samples",
        f"--out={out}",
        code="-c",
        program=WITHOUT_TORCH,
        env={"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert code == 0, error
    found = json.loads(out.read_text())
    assert found["results"].keys() == {"perplexity", "facts", "facts_rolling"}
    assert len(found["harness"]["samples"]["facts"]) == 6
    assert found["versions"]["lm_eval"].startswith("0.4")
    for name in ("acc_norm", "word_perplexity", "bits_per_byte"):
        assert name in printed


def test_the_table_has_a_line_for_each_metric():
    results = {
        "perplexity": {"loss": 1.5, "word_perplexity": None, "tokens": 12345},
        "facts": {
            "name": "facts",
            "alias": "facts",
            "sample_len": 60,
            "acc,none": 0.75,
            "acc_stderr,none": 0.0512345,
            "exact_match,strict": 1.0,
            "exact_match_stderr,strict": "N/A",
        },
    }
    written = io.StringIO()
    show(results, Console(file=written, width=120))
    lines = [line.split() for line in written.getvalue().splitlines()[1:]]
    assert lines == [
        ["perplexity", "loss", "1.5000"],
        ["word_perplexity", "not", "finite"],
        ["tokens", "12,345"],
        ["facts", "acc", "0.7500", "0.05123"],
        ["exact_match", "(strict)", "1.0000"],
    ]


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path):
    check_out(tmp_path / "new" / "found.json")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "cannot be made")):
        with pytest.raises(UserError, match=message):
            check_out(out)
