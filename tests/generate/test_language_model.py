"""A trained run, loaded: from its folder alone, and what is said where that cannot be."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import lmjax
from lmjax.engine.loop import train
from lmjax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two steps of the character config on a text that is gone afterwards."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text("To be, or not to be:\nthat is the question. " * 200)
    config = lmjax.load_config(
        f"{ROOT}/configs/char.py:smoke",
        {
            "steps": 2,
            "data.path": str(text),
            "save_every": 1,
            "optimizer.learning_rate.warmup_steps": 0,
        },
    )
    lmjax.train(config, str(folder / "run"), quiet=True, devices=jax.devices()[:1])
    text.unlink()
    return folder / "run"


def test_a_run_loads_without_its_corpus_and_speaks(workdir):
    lm = lmjax.load(workdir)
    assert lm.step == 2
    text = lm.generate("To be", max_tokens=30, seed=3)
    assert len(text) == 30 and text == lm.generate("To be", max_tokens=30, seed=3)
    assert text == "".join(lm.stream("To be", max_tokens=30, seed=3))
    assert lmjax.load(workdir, step=1).step == 1
    with pytest.raises(UserError, match="'Z'"):
        lm.generate("Z")


def test_greedy_text_follows_the_logits(workdir):
    lm = lmjax.load(workdir)
    prompt = "that is"
    token = int(np.argmax(lm.logits(prompt)[-1]))
    assert lm.generate(prompt, max_tokens=1, temperature=0.0) == lm.tokenizer.decode([token])


@pytest.mark.parametrize("step", [None, 2])
def test_a_damaged_checkpoint_is_named_and_left(workdir, tmp_path, step):
    run = shutil.copytree(workdir, tmp_path / "run")
    for path in (run / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"step 2 .*cannot be read.*Other steps: 1"):
        lmjax.load(run, step=step)
    assert lmjax.load(run, step=1).step == 1


def test_what_is_no_run_is_refused(workdir, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        lmjax.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 7; there are: 1, 2"):
        lmjax.load(workdir, step=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json cannot be read .*: it is damaged"),
        ("[" * 100_000, "cannot be read .*recursion"),
        ("[]", "has no task.model"),
        ('{"task": {"model": 5}}', "has no task.model"),
        ('{"task": {"model": {"_call": "lmjax.models.gpt:gtp"}}}', "is damaged: config: cannot"),
        ('{"task": {"model": {"_call": "json:loads", "s": "5"}}}', "is damaged: it gives 5"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        lmjax.load(tmp_path)


def test_the_launcher_and_the_notebook_are_one(workdir):
    """`lmjax.train` stays the function after the launcher's parts have been imported."""
    import lmjax.engine.loop

    assert callable(lmjax.train) and lmjax.engine.loop.train is train
