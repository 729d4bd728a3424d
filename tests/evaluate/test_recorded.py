"""`python -m lmjax.evaluate.run`: of every family, what training found of the same checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lmjax
from lmjax.config import leaves, load_config
from lmjax.convert.adapters import merge
from lmjax.convert.imports import import_folder
from lmjax.engine.curves import read_metrics
from lmjax.errors import UserError
from lmjax.evaluate.recorded import evaluate, recorded
from lmjax.evaluate.report import check_out, finite
from tests.convert import folders

ROOT = Path(__file__).parents[2]
STARTED = ("distill", "lora", "dpo")  # configs that start from imported weights


def train(name, folder, **changes):
    """Two steps of a config's smoke variant; its folder."""
    path = f"{ROOT}/configs/{name}.py"
    changes = {"steps": 2, "eval_every": 0, **changes}
    changes |= {k: 1 for k, _ in leaves(load_config(path)) if k.endswith(".warmup_steps")}
    if name in STARTED:
        source = folders.write(folder / "in", folders.LLAMA, folders.drawn(folders.LLAMA))
        import_folder(source, folder / "imported")
        changes["init_from.path"] = str(folder / "imported")
    config = load_config(f"{path}:smoke", changes)
    lmjax.train(config, str(folder / "run"), quiet=True, devices=jax.devices()[:1])
    return folder / "run"


def last(workdir):
    """What training found: (numbers, samples)."""
    row = {k: v for k, v in read_metrics(workdir / "metrics.jsonl")[-1].items() if "/" in k}
    samples = workdir / "samples.txt"
    return row, samples.read_text() if samples.exists() else ""


def found_of(workdir, folder, devices, *, config="", **overrides):
    run = recorded(workdir, config=str(config), overrides=overrides)
    found, step = evaluate(run, workdir, folder=folder, devices=devices)
    flat = {f"{e}/{k}": v for e, numbers in found.items() for k, v in numbers.items()}
    texts = {k: v for k, v in flat.items() if isinstance(v, str)}
    return {k: v for k, v in flat.items() if k not in texts}, texts, step


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    return train("diabetes", tmp_path_factory.mktemp("regression"))


def test_a_regression_gives_what_training_found(regression, tmp_path, devices):
    numbers, texts, step = found_of(regression, tmp_path, devices[:1])
    wanted, _ = last(regression)
    assert step == 2 and not texts and numbers.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-6, err_msg=name)


def test_what_cannot_be_evaluated_is_refused(regression, tmp_path, devices):
    with pytest.raises(UserError, match="holds no run"):
        recorded(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((regression / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({"task": config["task"]}))
    with pytest.raises(UserError, match="names no data: give --config=RUN"):
        recorded(bare)
    run = recorded(bare, config=str(regression))
    with pytest.raises(UserError, match="has no checkpoint"):
        evaluate(run, bare, folder=tmp_path, devices=devices[:1])
    with pytest.raises(UserError, match="Did you mean 'patients'"):
        evaluate(run, regression, folder=tmp_path, only=("patient",), devices=devices[:1])
    other = recorded(regression, overrides={"data.valid_fraction": "0.3"})
    with pytest.raises(UserError, match=r"the columns of .* is another"):
        evaluate(other, regression, folder=tmp_path, devices=devices[:1])


def test_what_is_not_finite_is_null_in_json(tmp_path):
    found = finite({"valid": {"loss": float("nan"), "auc": 0.5, "text": "x"}})
    assert found == {"valid": {"loss": None, "auc": 0.5, "text": "x"}}
    check_out(tmp_path / "new" / "found.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["char", "lstm", "sentiment", "service", "digits", "dcgan", "translate", "distill", "lora"],
)
def test_every_family_gives_what_training_found(name, tmp_path, devices):
    workdir = train(name, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    wanted, samples = last(workdir)
    numbers, texts, _ = found_of(workdir, out, devices[:1])
    assert numbers.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(numbers[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    assert all(text in samples for text in texts.values()) and bool(texts) == bool(samples)
    drawn = {path.name for path in workdir.glob("*.png")} - {"curves.png"}
    assert {path.name for path in out.iterdir()} == drawn
    assert bool(drawn) == (name in ("sentiment", "service", "dcgan"))


@pytest.mark.slow
def test_eight_devices_equal_one_and_without_evals_the_loss_is_taken(tmp_path, devices):
    workdir = train("char", tmp_path, **{"evals.valid.max_batches": 0})
    wanted, _ = last(workdir)
    numbers, _, _ = found_of(workdir, tmp_path, devices)
    np.testing.assert_allclose(numbers["valid/loss"], wanted["valid/loss"], rtol=1e-5)
    config = json.loads((workdir / "config.json").read_text())
    del config["evals"]
    (workdir / "config.json").write_text(json.dumps(config))
    numbers, _, _ = found_of(workdir, tmp_path, devices[:1])
    np.testing.assert_allclose(numbers["valid/loss"], wanted["valid/loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_merged_folder_is_read_with_the_data_of_its_run(tmp_path):
    """By the command: equal to the adapted run, whose config says what is held out."""
    workdir = train("lora", tmp_path)
    merge(workdir, tmp_path / "merged")
    out = tmp_path / "made" / "found.json"
    flags = [f"--workdir={tmp_path / 'merged'}", f"--config={workdir}", f"--out={out}"]
    command = [sys.executable, "-m", "lmjax.evaluate.run", *flags]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found, (wanted, _) = json.loads(out.read_text()), last(workdir)
    loss = found["results"]["valid"]["loss"]
    np.testing.assert_allclose(loss, wanted["valid/loss"], rtol=2e-3)  # products of bfloat16
    assert f"{loss:.4f}" in done.stdout and found["step"] == 0 and found["tokenizer"]
    more = [*flags[:2], "--config.evals.valid.max_batches=1", "--evals=valid"]
    done = subprocess.run([*command[:3], *more], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "valid" in done.stdout
    shutil.rmtree(tmp_path / "merged" / "checkpoints" / "0" / "state" / "d")
    done = subprocess.run([*command[:3], *more], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: the checkpoint")
