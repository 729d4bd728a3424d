"""Two and four processes, joined by gloo, do what one process does on the same mesh.

Losses, evaluations and parameters are compared to 1e-6 (relative; between processes sums are taken
in another order), the rows that are read byte for byte.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.curves import read_metrics
from lmjax.engine.loop import train
from lmjax.sharding import Layout
from tests.many_hosts import Rows, make_run

ROOT = Path(__file__).parents[1]
LIMIT_S = 120
QUICK = {
    "fsdp": {"data": 1, "fsdp": 4},  # parameters split between the processes
    "tensor": {"data": 1, "tensor": 4},  # both processes hold the same rows
}
SLOW = {
    "data-tensor": {"data": 2, "tensor": 4},  # two processes hold the same rows, the others others
    "slices-fsdp-tensor": {"slices": 2, "fsdp": 2, "tensor": 2},
    "context-expert": {"data": 1, "context": 4, "expert": 2},  # rows split within each process
}


CONFIG = """
import optax
from lmjax.config import call
from lmjax.engine.run import Run
from lmjax.sharding import Layout
from tests.many_hosts import Network, Rows

def get_config():
    return call(
        Run,
        task=call(Network),
        optimizer=call(optax.adam, learning_rate=0.05),
        data=call(Rows),
        steps=100_000,
        batch_size=16,
        layout=call(Layout, data=-1),
        save_every=100_000,
        log_every=1,
    )
"""


def start(command, *, count, devices, cache, folders=None, pause_s=0.0):
    """Starts `count` processes of one run on this machine."""
    with socket.create_server(("", 0)) as server:
        coordinator = f"{socket.gethostname()}:{server.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_ADDOPTS")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "LMJAX_CACHE": str(cache),
        "LMJAX_COORDINATOR": coordinator,
        "LMJAX_NUM_PROCESSES": str(count),
        "PYTHONPATH": str(ROOT),
        "DEVICES": str(devices),
        "PAUSE_S": str(pause_s),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folders[index] if folders else ROOT,
            env=environment | {"LMJAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def end(processes, codes):
    """Waits for all; what they printed. Fails with the tails of all outputs."""
    deadline, outputs = time.monotonic() + LIMIT_S, []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(deadline - time.monotonic(), 1))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0] + "\n(killed: it did not end)")
    found = [process.returncode for process in processes]
    tails = "\n".join(f"--- process {i}\n{text[-3000:]}" for i, text in enumerate(outputs))
    assert found == codes, f"exit codes {found}\n{tails}"
    return outputs


def train_together(runs, folder, *, count, devices, cache, codes=None):
    """Trains the runs with many processes."""
    command = ["tests.many_hosts", json.dumps(runs), str(folder)]
    processes = start(command, count=count, devices=devices, cache=cache)
    return end(processes, [0] * count if codes is None else codes)


@pytest.fixture(scope="module")
def together(tmp_path_factory, cache):
    """The folder of the quick runs of two processes with two devices each; the last one breaks."""
    folder = tmp_path_factory.mktemp("together")
    runs = {**QUICK, "broken": {"data": 4, "steps": 12, "broken_at": 10}}
    outputs = train_together(runs, folder, count=2, devices=2, cache=cache, codes=[1, 1])
    for index, text in enumerate(outputs):
        (folder / f"output{index}").write_text(text)
    return folder


@pytest.fixture(scope="module")
def together_slow(tmp_path_factory, cache):
    """Likewise, of four processes."""
    folder = tmp_path_factory.mktemp("together")
    train_together(SLOW, folder, count=4, devices=2, cache=cache)
    return folder


def values_of(workdir):
    """The numbers of metrics.jsonl that do not depend on time, by (step, name)."""
    rows = read_metrics(workdir / "metrics.jsonl")
    names = ("loss", "grad_norm", "valid/loss")
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


def equal_to_one_process(workdir, fields, num_shards, *, count, alone):
    """The run in `workdir` against one of this process on the same mesh."""
    devices = jax.devices()[: math.prod(fields.values())]
    state = train(make_run(Layout(**fields)), alone, devices=devices, quiet=True)
    expected = values_of(alone)
    assert [key for key in expected if key[1] != "grad_norm"] == [
        (step, name)
        for step in range(1, 11)
        for name in ("loss", *(["valid/loss"] if step in (5, 10) else []))
    ]
    assert values_of(workdir) == pytest.approx(expected, rel=1e-6)
    whole, shards = next(Rows().batches(batch_size=16, seed=0)), []
    for index in range(count):
        with np.load(workdir / f"rows{index}.npz") as found:
            shard, of = (int(x) for x in found["shard"])
            for name, value in whole.items():
                assert found[name].tobytes() == np.split(value, of)[shard].tobytes()
        shards.append((shard, of))
        if (workdir / f"params{index}.npz").exists():
            with np.load(workdir / f"params{index}.npz") as found:
                for name, value in state.params.items():
                    np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7)
    assert sorted(set(shards)) == [(shard, num_shards) for shard in range(num_shards)]


@pytest.mark.parametrize(("name", "num_shards"), [("fsdp", 2), ("tensor", 1)])
def test_two_processes_equal_one(together, name, num_shards, tmp_path):
    assert (together / name / "params1.npz").exists()
    equal_to_one_process(together / name, QUICK[name], num_shards, count=2, alone=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_shards"), [("data-tensor", 2), ("slices-fsdp-tensor", 4), ("context-expert", 1)]
)
def test_four_processes_equal_one(together_slow, name, num_shards, tmp_path):
    assert (together_slow / name / "params3.npz").exists()
    equal_to_one_process(together_slow / name, SLOW[name], num_shards, count=4, alone=tmp_path)


@pytest.mark.parametrize("name", ["fsdp", pytest.param("tensor", marks=pytest.mark.slow)])
def test_one_process_goes_on_from_what_two_saved(together, name, tmp_path):
    """On another mesh, too: two more steps equal those of a run that never stopped."""
    shutil.copytree(together / name, tmp_path / "run")
    for folder, devices in (("run", 2), ("whole", 4)):
        layout = Layout(data=1, fsdp=devices)
        run = make_run(layout, steps=12)
        train(run, tmp_path / folder, devices=jax.devices()[:devices], quiet=True)
    found, expected = (values_of(tmp_path / folder) for folder in ("run", "whole"))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_saved(cache, tmp_path):
    train(make_run(Layout(fsdp=2)), tmp_path / "run", devices=jax.devices()[:2], quiet=True)
    runs = {"run": {"data": 1, "fsdp": 4, "steps": 12}}
    train_together(runs, tmp_path, count=2, devices=2, cache=cache)
    train(make_run(Layout(), steps=12), tmp_path / "one", devices=jax.devices()[:1], quiet=True)
    assert values_of(tmp_path / "run") == pytest.approx(values_of(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_both(cache, tmp_path):
    """Else one would go on from step 10 and the other from step 6."""
    runs = {"run": {"data": 1, "fsdp": 4}}
    train_together(runs, tmp_path, count=2, devices=2, cache=cache)
    runs["run"]["unreadable"] = 10
    outputs = train_together(runs, tmp_path, count=2, devices=2, cache=cache)
    assert "the checkpoint of step 10 cannot be read and is set aside: a block" in outputs[0]
    assert (tmp_path / "run" / "checkpoints" / "10.unreadable").exists()
    train(make_run(Layout(), steps=10), tmp_path / "one", devices=jax.devices()[:1], quiet=True)
    assert values_of(tmp_path / "run") == pytest.approx(values_of(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
def test_sigterm_on_one_process_stops_both_at_the_same_step(cache, tmp_path):
    """And one process alone goes on from there, as a run that was never stopped."""
    (tmp_path / "endless.py").write_text(CONFIG)
    flags = [f"--config={tmp_path}/endless.py", f"--workdir={tmp_path}/run", "--devices=2"]
    processes = start(["lmjax.train", *flags], count=2, devices=2, cache=cache)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and all(p.poll() is None for p in processes):
        if metrics.exists() and metrics.stat().st_size > 0:
            processes[1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    outputs = end(processes, [143, 143])
    (step,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert 1 <= step < 100_000
    assert f"stopped by SIGTERM after step {step}, which is saved" in outputs[0]
    assert "To continue" not in outputs[1]
    assert not any("Traceback" in output for output in outputs)
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, step + 1))
    assert sorted(p.name for p in (tmp_path / "run").glob(".shared*")) == []


STEPS = 40


def train_command(folder, workdir, devices):
    """40 steps, saved every five."""
    (folder / "endless.py").write_text(CONFIG)
    flags = {"config": folder / "endless.py", "workdir": workdir, "devices": devices}
    flags |= {"config.steps": STEPS, "config.save_every": 5}
    return ["lmjax.train", *(f"--{name}={value}" for name, value in flags.items())]


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The values of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    command = train_command(folder, folder / "run", 2)
    end(start(command, count=2, devices=2, cache=cache), [0, 0])
    return values_of(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_for_one_process_ends_both_soon(cache, tmp_path, full):
    """The other one waits for it to commit; what was saved before is whole."""
    runs = {"run": {"data": 1, "fsdp": 4, "steps": 6}}
    train_together(runs, tmp_path, count=2, devices=2, cache=cache)
    runs["run"] |= {"unwritable": full, "steps": 12}
    began = time.monotonic()
    outputs = train_together(runs, tmp_path, count=2, devices=2, cache=cache, codes=[1, 1])
    assert time.monotonic() - began < 60
    assert "no space left on this host's disk" in outputs[full]
    assert f"process {full} failed" in outputs[1 - full]
    assert "no space left" in outputs[1 - full]
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [6]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])  # 0 is the coordinator, without which jax aborts
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_the_loss_of_one_process_ends_both_and_any_number_go_on(
    cache, tmp_path, whole, victim, signum
):
    """With as many processes the rest is bit-equal to a run that was never stopped."""
    command = train_command(tmp_path, tmp_path / "run", 2)
    processes = start(command, count=2, devices=2, cache=cache, pause_s=0.1)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and not reached(metrics, 12):
        time.sleep(0.01)
    processes[victim].send_signal(signum)
    sent = time.monotonic()
    killed = signum == signal.SIGKILL
    codes = [75, 75] if killed else [143, 143]
    if killed:
        codes[victim] = -signal.SIGKILL
    outputs = end(processes, codes)
    assert time.monotonic() - sent < 20
    if killed:
        lost = f"error: lost process {victim} (its connection ended without a farewell)"
        assert lost in outputs[1 - victim]
        assert "Traceback" not in outputs[1 - victim]
    saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*[0-9]"))
    assert 10 <= saved < STEPS
    for count, devices in ((2, 2), (1, 4), (4, 1)):
        folder = tmp_path / f"of{count}"
        shutil.copytree(tmp_path / "run", folder)
        again = train_command(tmp_path, folder, devices)
        outputs = end(start(again, count=count, devices=devices, cache=cache), [0] * count)
        assert f"continuing from step {saved}" in outputs[0]
        found = values_of(folder)
        assert found == (whole if count == 2 else pytest.approx(whole, rel=1e-5))


def reached(metrics, step):
    """Whether the run in this folder is through this step."""
    return metrics.exists() and any(row["step"] >= step for row in read_metrics(metrics))


def test_an_error_of_one_process_ends_both_at_once(together):
    """The other one waits in a collective, which never ends by itself."""
    outputs = [(together / f"output{index}").read_text() for index in range(2)]
    assert "error: process 1 failed: RuntimeError: the disk of this host is gone" in outputs[0]
    assert "Traceback" not in outputs[0]
    assert "Traceback" in outputs[1] and "the disk of this host is gone" in outputs[1]


def test_two_processes_equal_one_until_one_of_them_breaks(together, tmp_path):
    """Data-parallel, by all that the run has written before its end."""
    equal_to_one_process(together / "broken", {"data": 4}, 2, count=2, alone=tmp_path)
    assert [int(p.name) for p in (together / "broken" / "checkpoints").iterdir()] == [6]


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused_by_all(cache, tmp_path):
    """Two hosts with a disk each: the working folders differ, and the path is relative."""
    (tmp_path / "endless.py").write_text(CONFIG)
    command = ["lmjax.train", f"--config={tmp_path}/endless.py", "--workdir=run"]
    folders = [tmp_path / str(index) for index in range(2)]
    for folder in folders:
        folder.mkdir()
    processes = start(command, count=2, devices=1, cache=cache, folders=folders)
    outputs = end(processes, [2, 2])
    assert "process 1 does not see what process 0 writes to run" in outputs[0]
