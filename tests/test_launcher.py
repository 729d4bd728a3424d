"""`python -m lmjax.train` as a person meets it: exit codes, messages, stopping and going on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = "--config=configs/char.py:smoke"
SMALL = (SMOKE, "--config.task.model.num_layers=1", "--config.task.model.unroll=1")
STEPS = 100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One good file, and one for each way of being none."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "good.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "latin1.txt").write_bytes("caf\xe9 ".encode("latin1") * 500)
    (folder / "short.txt").write_text("short")
    return folder


@pytest.fixture(scope="module")
def environment(cache, tmp_path_factory):
    """One device, the session's cache, and a home that must stay empty."""
    home = tmp_path_factory.mktemp("home")
    yield {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "LMJAX_CACHE": str(cache),
        "HOME": str(home),
    }
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def launch(environment):
    """Runs the launcher to its end."""

    def run(*arguments, command=(sys.executable, "-m", "lmjax.train")):
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SMOKE, "--config.stpes=2"], "config has no field 'stpes'. Did you mean 'steps'?"),
        ([SMOKE, "--config.steps", "two"], "config.steps: expected int, got 'two'."),
        ([SMOKE, "--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
        ([SMOKE, "--devices=-1"], "--devices"),
        ([SMOKE, "steps=2"], "unexpected arguments: steps=2."),
        (["--config=configs/chra.py"], "no config file 'configs/chra.py'. Did you mean "),
        (["--config=configs/char.py:smok"], "no variant 'smok'. Did you mean 'smoke'?"),
        ([], "--config is not given"),
    ],
)
def test_bad_command(launch, arguments, message, tmp_path):
    done = launch(f"--workdir={tmp_path}/run", *arguments)
    refused(done, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.txt", "empty.txt holds no text"),
        ("binary.txt", "binary.txt is binary (a zero at byte 0): give text in UTF-8."),
        ("latin1.txt", "latin1.txt is not UTF-8 at byte 3"),
        ("short.txt", "short.txt holds 4 tokens, and one example needs 65."),
        ("good.tx", "good.tx'. Did you mean "),
    ],
)
def test_bad_corpus(launch, corpus, name, message, tmp_path):
    flag = f"--config.data.path={corpus / name}"
    refused(launch(*SMALL, flag, f"--workdir={tmp_path}/run"), message)


def test_batch_that_the_mesh_does_not_divide(launch, corpus, tmp_path):
    done = launch(
        SMOKE,
        f"--config.data.path={corpus / 'good.txt'}",
        "--config.batch_size=12",
        "--devices=8",
        f"--workdir={tmp_path}",
    )
    refused(done, "batch_size 12 does not divide into 8 data-parallel parts", "that do: 8 or 16.")


def test_explain(launch, corpus):
    done = launch(
        SMOKE, f"--config.data.path={corpus / 'good.txt'}", "--config.steps=9", "--explain"
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for line in (
        "steps = 9  (flag)",
        "optimizer.learning_rate.steps = 9  (flag)",
        "batch_size = 16  (file)",
        "optimizer.b2 = 0.99  (file)",
        "optimizer.b1 = 0.9  (default)",
        "optimizer = 'lmjax.optim.presets:adamw'  (file)",
    ):
        assert line in lines


def test_workdir_is_asked_for(launch, corpus):
    refused(
        launch(SMOKE, f"--config.data.path={corpus / 'good.txt'}"), "--workdir is not given: name"
    )


@pytest.fixture(scope="module")
def stopped(environment, corpus, tmp_path_factory):
    """(workdir, process, its output) of a run that got SIGTERM some steps after its start."""
    workdir = tmp_path_factory.mktemp(
        "stopped run"
    )  # a space, which the printed command must quote
    arguments = [
        *SMALL,
        f"--config.data.path={corpus / 'good.txt'}",
        f"--config.steps={STEPS}",
        "--config.log_every=1",
        f"--workdir={workdir}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmjax.train", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and len(steps_of(workdir)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return workdir, process, process.communicate(timeout=60)


def test_sigterm_saves_and_says_how_to_go_on(stopped):
    workdir, process, (output, errors) = stopped
    assert process.returncode == 143
    assert "Traceback" not in errors
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 3 <= step < STEPS
    assert f"stopped by SIGTERM after step {step}, which is saved" in output
    assert steps_of(workdir) == list(range(1, step + 1))


@pytest.mark.slow
def test_the_printed_command_goes_on_to_the_end(stopped, launch):
    workdir, _, (output, _) = stopped
    (line,) = [line for line in output.splitlines() if "To continue: " in line]
    before = metrics_of(workdir)
    done = launch(command=shlex.split(line.partition("To continue: ")[2]))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"continuing from step {len(before)}" in done.stderr
    assert steps_of(workdir) == list(range(1, STEPS + 1))
    assert metrics_of(workdir)[: len(before)] == before
    assert "valid/loss" in done.stdout
    assert (workdir / "curves.png").stat().st_size > 0


@pytest.mark.slow
def test_workdir_of_another_run_is_left_alone(stopped, launch, corpus):
    workdir, *_ = stopped
    before = metrics_of(workdir)
    done = launch(
        *SMALL,
        f"--config.data.path={corpus / 'good.txt'}",
        "--config.task.model.dim=64",
        f"--workdir={workdir}",
    )
    refused(
        done,
        f"{workdir} holds a run with another config:",
        "task.model.dim: 32 -> 64  (the parameters or the loss are another model's)",
        "use another --workdir.",
    )
    assert metrics_of(workdir) == before


def test_loss_that_is_no_number_stops_the_run(launch, corpus, tmp_path):
    done = launch(
        *SMALL,
        f"--config.data.path={corpus / 'good.txt'}",
        "--config.optimizer.learning_rate.peak=1e30",
        f"--workdir={tmp_path}",
    )
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)
    assert "is bad: the loss is nan" in done.stderr
    assert "Then lower the learning rate" in done.stderr


@pytest.mark.slow
def test_a_save_that_never_ends_does_not_keep_the_process(launch, corpus, tmp_path):
    """Nor does its thread, for which an interpreter that ends as usual would wait."""
    hanging = """
import threading, time
from absl import app
import lmjax.train
from lmjax.engine import checkpoint

def hang(self, *arguments, made=checkpoint.Checkpoints.__init__, **options):
    made(self, *arguments, **{**options, "slow_s": 0.2})
    self._manager.is_saving_in_progress = lambda: self._last is not None

checkpoint.Checkpoints.__init__ = hang
threading.Thread(target=time.sleep, args=(1000,)).start()
app.run(lmjax.train.main, flags_parser=lmjax.train.parse_flags)
"""
    done = launch(
        *SMALL,
        f"--config.data.path={corpus / 'good.txt'}",
        "--config.save_every=1",
        f"--workdir={tmp_path}",
        command=(sys.executable, "-c", hanging),
    )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "the save of step 1 to" in done.stderr and "did not end" in done.stderr


def refused(done, *messages):
    """Exit code 2, and on stderr one message without a traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr


def metrics_of(workdir):
    """The whole lines of metrics.jsonl about training steps."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def steps_of(workdir):
    return [row["step"] for row in metrics_of(workdir)]
