"""`python -m lmjax.checkpoint`: what it prints and how it exits, in process and as a command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from lmjax import checkpoint
from lmjax.engine.checkpoint import Checkpoints
from tests.engine.test_stored import overwrite

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workdir with steps 2 and 4, of which one array, the config and the data differ."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir / "checkpoints")
    for step in (2, 4):
        state = {
            "params": {"a": jnp.arange(6.0) * step, "b": jnp.ones((2, 3), jnp.bfloat16)},
            "step": jnp.asarray(step),
        }
        about = {"config": {"steps": 10 * step, "seed": 0}, "tokenizer": "t"}
        checkpoints.save(step, state, {**about, "data": {"next_batch": step}})
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def run(capsys):
    """Runs the command in this process: (exit code, output, errors)."""

    def call(*argv):
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        rest, step = [], None
        for argument in argv:
            if str(argument).startswith("--step="):
                step = int(argument.removeprefix("--step="))
            else:
                rest.append(str(argument))
        checkpoint.STEP.value  # noqa: B018
        flags.FLAGS.step = step
        with pytest.raises(SystemExit) as end:
            checkpoint.main(["checkpoint", *rest])
        out = capsys.readouterr()
        return int(end.value.code), out.out, out.err

    yield call
    flags.FLAGS.step = None


def rows(text):
    return [line.split() for line in text.splitlines()[1:]]


def test_ls_lists_what_there_is_and_what_is_known_of_it(run, workdir):
    code, out, _ = run("ls", workdir)
    assert code == 0
    assert [row[0] for row in rows(out)] == ["2", "4"]
    assert all("one device (1 x cpu, 1 process(es))" in line for line in out.splitlines()[1:])
    assert out.count("not yet") == 2
    assert run("verify", workdir, "--step=4")[0] == 0
    Checkpoints(workdir / "checkpoints").set_aside(2, "a reason")
    code, out, _ = run("ls", workdir / "checkpoints")
    assert [row[0] for row in rows(out)] == ["4", "2.unreadable"]
    assert "whole, 20" in out and "set aside: a reason" in out and "not yet" not in out
    (workdir / "checkpoints" / "4" / "about" / "metadata").write_text("{")
    assert "DAMAGED: its manifest, about/metadata, cannot be read" in run("ls", workdir)[1]


def test_verify_names_what_is_bad(run, workdir):
    code, out, _ = run("verify", workdir)
    assert code == 0
    assert out.startswith("step 2: whole (3 arrays, ") and "step 4: whole (3 arrays" in out
    overwrite(workdir / "checkpoints" / "4", "params/a", 3, np.float32(7))
    code, out, _ = run("verify", workdir)
    assert code == 1
    assert "step 2: whole" in out
    assert "step 4: DAMAGED\n  params/a has not the checksum that it was saved with" in out
    assert "DAMAGED, 20" in run("ls", workdir)[1]
    assert run("verify", workdir / "checkpoints" / "2")[0] == 0
    shutil.rmtree(workdir / "checkpoints" / "2" / "state")
    code, out, _ = run("verify", workdir / "checkpoints" / "2")
    assert code == 1 and out.count("cannot be opened") == 3


def test_diff_says_what_differs(run, workdir):
    one, other = (workdir / "checkpoints" / step for step in "24")
    code, out, _ = run("diff", one, other)
    assert code == 1
    assert out.splitlines() == [
        f"{one} -> {other}",
        "  step: 2 -> 4",
        "  config.steps: 20 -> 40",
        "  data.next_batch: 2 -> 4",
        "  params/a: max |a - b| = 10",
        "  step: max |a - b| = 2",
        "1 arrays are the same, bit for bit by their checksums",
    ]
    code, out, _ = run("diff", workdir, other)
    assert code == 0 and out.endswith("3 arrays are the same, bit for bit by their checksums\n")


def test_diff_of_other_arrays_and_of_damaged_ones(run, workdir, tmp_path):
    checkpoints = Checkpoints(tmp_path / "other")
    state = {"params": {"a": jnp.zeros(5), "c": jnp.zeros(1)}, "step": jnp.asarray(4)}
    checkpoints.save(4, state, {"config": {"steps": 40, "seed": 0}, "tokenizer": "u"})
    checkpoints.close()
    code, out, _ = run("diff", workdir, tmp_path / "other", "--step=4")
    assert code == 1
    assert "params/a: float32[6] -> float32[5]" in out
    assert f"params/b: only in {workdir / 'checkpoints' / '4'}" in out
    assert f"params/c: only in {tmp_path / 'other' / '4'}" in out
    assert "  tokenizer: " in out
    (tmp_path / "other" / "4" / "about" / "metadata").unlink()
    code, _, error = run("diff", workdir, tmp_path / "other")
    assert code == 2 and error.startswith("error: a checkpoint is damaged, and cannot be compared")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: nothing is no command: give ls, verify or diff"),
        (["list", "x"], "error: list is no command"),
        (["ls"], "error: ls takes 1 folder(s), and 0 are given"),
        (["diff", "x"], "error: diff takes 2 folder(s), and 1 are given"),
        (["ls", "no/such/folder"], "is no folder: name a workdir or a checkpoint"),
        (["verify", "lmjax"], "has no checkpoint; there are: none"),
    ],
)
def test_mistakes_are_explained(run, argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, error = run(*argv)
    assert code == 2 and message in error and not out


def test_the_command_itself(workdir):
    def call(*argv):
        return subprocess.run(
            [sys.executable, "-m", "lmjax.checkpoint", *argv],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )

    overwrite(workdir / "checkpoints" / "4", "params/b", (1, 1), jnp.bfloat16(2))
    done = call("verify", str(workdir), "--step=4")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[1] == "  params/b has not the checksum that it was saved with"
    done = call("ls", str(workdir), "--step=x")
    assert done.returncode == 2 and done.stderr.startswith("error: flag --step=x")
