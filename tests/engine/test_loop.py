"""Training to the end, stopping, resuming, and refusing another run's folder."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from lmjax.engine import loop, warm_start
from lmjax.engine.changes import config_changes
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.curves import read_metrics
from lmjax.engine.loop import BadStep, Interrupted, train
from lmjax.engine.replicas import Corrupt
from lmjax.engine.run import compile_run
from lmjax.engine.watchdog import Watch
from lmjax.errors import UserError
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import constant
from lmjax.sharding import Layout
from tests.engine.linear_task import Linear, Points, make_run

ONE = {"quiet": True}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """These tests are of the loop: a mesh adds nothing."""
    monkeypatch.setitem(ONE, "devices", jax.devices()[:1])


def rows_of(workdir):
    return [r for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]


def test_a_whole_run_leaves_its_files(tmp_path):
    state = train(make_run(evals={"valid": Numbers()}, eval_every=5), tmp_path, **ONE)
    assert int(state.step) == 10
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 11))
    assert [(r["step"], r["valid/seen"]) for r in rows if "valid/seen" in r] == [(5, 5), (10, 10)]
    assert {"grad_norm", "absolute", "rows_per_s", "epoch"} <= rows[0].keys()
    assert "mfu" not in rows[0]  # the peak of this CPU is not listed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "a sample" in (tmp_path / "samples.txt").read_text()
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert rows_of(tmp_path)[-1]["loss"] < 0.5 * rows_of(tmp_path)[0]["loss"]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """An evaluator that tells the step of the state it was given."""

    def check(self, task, data, *, ways):
        pass

    def __call__(self, session):
        return {"seen": float(session.state.step), "text": "a sample"}


@dataclasses.dataclass(frozen=True)
class Signal:
    """An evaluator that sends this process a signal."""

    signum: int

    def check(self, task, data, *, ways):
        pass

    def __call__(self, session):
        os.kill(os.getpid(), self.signum)
        return {}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(tmp_path, signum):
    whole = train(make_run(), tmp_path / "whole", **ONE)
    stopped = make_run(evals={"stop": Signal(signum)}, eval_every=3)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        train(stopped, tmp_path / "stopped", **ONE)
    assert caught.value.exit_code == 128 + signum
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert Checkpoints(tmp_path / "stopped" / "checkpoints").steps() == [3]
    resumed = train(make_run(), tmp_path / "stopped", **ONE)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    compared = [
        [(r["step"], r["loss"]) for r in rows_of(tmp_path / d)] for d in ("whole", "stopped")
    ]
    assert compared[0] == compared[1]


@dataclasses.dataclass(frozen=True)
class Long:
    """An evaluator of many batches, in the third of which the process gets SIGTERM, if `stops`."""

    stops: bool

    def check(self, task, data, *, ways):
        pass

    def __call__(self, session):
        batch = next(session.data.batches(batch_size=16, seed=0))
        for number in range(5):
            if number == 2 and self.stops:
                os.kill(os.getpid(), signal.SIGTERM)
            loss = session.eval_step(batch)["loss"]
            assert number < 2 or not self.stops, "the evaluation went on"
        return {"loss": float(loss.value)}


def test_a_stop_does_not_wait_for_an_evaluation_which_the_resume_makes(tmp_path):
    with pytest.raises(Interrupted, match="after step 5"):
        train(make_run(evals={"long": Long(stops=True)}, eval_every=5), tmp_path, **ONE)
    assert not any("long/loss" in row for row in read_metrics(tmp_path / "metrics.jsonl"))
    train(make_run(evals={"long": Long(stops=False)}, eval_every=5), tmp_path, **ONE)
    evaluated = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "long/loss" in r]
    assert evaluated == [5, 10]


def test_lines_of_steps_that_run_again_are_dropped(tmp_path):
    """Killed after step 6 with a checkpoint of step 4: 5 and 6 stand once, a torn line is gone."""
    train(make_run(steps=6, save_every=4, keep_last=5), tmp_path, **ONE)
    os.rename(tmp_path / "checkpoints" / "6", tmp_path / "gone")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    train(make_run(), tmp_path, **ONE)
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 11))


def test_a_finished_run_stays_as_it_is(tmp_path):
    first = train(make_run(), tmp_path, **ONE)
    again = train(make_run(), tmp_path, **ONE)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    with pytest.raises(UserError, match="past steps = 6"):
        train(make_run(steps=6), tmp_path, **ONE)


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(tmp_path):
    run = make_run(data=Points(nan_at=5))
    with pytest.raises(BadStep, match=r"step 6 is bad: the loss is nan .*step 4 is saved"):
        train(run, tmp_path, **ONE)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4]
    with pytest.raises(BadStep, match="nothing is saved"):
        train(make_run(data=Points(nan_at=3)), tmp_path / "early", **ONE)


def test_an_evaluation_that_a_stop_prevented_is_made_on_resume(tmp_path):
    train(make_run(), tmp_path, **ONE)
    train(make_run(evals={"valid": Numbers()}), tmp_path, **ONE)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 10, "valid/seen": 10}
    train(make_run(evals={"valid": Numbers()}), tmp_path, **ONE)
    assert sum("valid/seen" in row for row in read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="no folder of a run"):
        train(make_run(), tmp_path, config=OLD, **ONE)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "gpt2"}'


def test_the_average_of_parameters_is_what_is_evaluated(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Kernel:
        def check(self, task, data, *, ways):
            pass

        def __call__(self, session):
            return {"kernel": float(session.variables()["params"]["kernel"][0])}

    optimizer = adamw(learning_rate=constant(peak=0.1), weight_decay=0.0, average=0.5)
    state = train(make_run(optimizer=optimizer, evals={"e": Kernel()}), tmp_path, **ONE)
    average = optax.tree_utils.tree_get(state.opt_state, "averaged_params")["kernel"]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["e/kernel"] == float(average[0])
    assert float(average[0]) != float(state.params["kernel"][0])
    step, variables, _ = Checkpoints(tmp_path / "checkpoints").restore_for_inference()
    assert step == 10
    np.testing.assert_array_equal(variables["params"]["kernel"], average)
    assert variables["counts"]["batches"] == 10


OLD = {"task": {"dim": 4}, "seed": 0, "steps": 10, "layout": {"data": 1}, "log_every": 1}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"task": {"dim": 8}}, "breaks", "another model"),
        ({"seed": 1}, "breaks", "another order"),
        ({"steps": 20}, "curve", "another schedule"),
        ({"layout": {"data": 2}}, "curve", "rounding"),
        ({"optimizer": {"learning_rate": {"warmup_steps": 4}}}, "curve", "another schedule"),
        ({"log_every": 5}, "harmless", ""),
        ({"optimizer": {"b1": 0.5}}, "breaks", "optimizer's state"),
    ],
)
def test_what_a_changed_config_breaks_is_said(change, kind, words):
    changes = config_changes(OLD, {**OLD, **change})
    assert [row[0] for row in changes] == [kind]
    assert words in changes[0][2]


def test_a_workdir_of_another_run_is_refused(tmp_path, caplog):
    train(make_run(), tmp_path, config=OLD, **ONE)
    with pytest.raises(UserError, match=r"task.dim: 4 -> 8  \(the parameters"):
        train(make_run(), tmp_path, config={**OLD, "task": {"dim": 8}}, **ONE)
    assert json.loads((tmp_path / "config.json").read_text()) == OLD
    longer = {**OLD, "steps": 12}
    state = train(make_run(steps=12), tmp_path, config=longer, **ONE)
    assert int(state.step) == 12
    assert "steps: 10 -> 12  (the learning rate" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text()) == longer


def test_another_tokenizer_is_refused(tmp_path):
    train(make_run(steps=4), tmp_path, **ONE)
    with pytest.raises(UserError, match="the same numbers would mean something else"):
        train(make_run(data=Points(tokenizer_text="other")), tmp_path, **ONE)


def test_a_corpus_that_changed_is_refused(tmp_path, monkeypatch):
    """Though its tokenizer is the same, and no field of the config tells."""
    train(make_run(steps=4), tmp_path, **ONE)
    monkeypatch.setattr(Points, "fingerprint", "other points")
    with pytest.raises(UserError, match="batches would repeat or be lost"):
        train(make_run(), tmp_path, **ONE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"microbatches": 3}, "no multiple of microbatches"),
        ({"keep_every": 6}, "no multiple of save_every"),
        ({"trainable": "("}, "no regular expression"),
        ({"eval_every": -1}, "eval_every is -1"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make_run(**change)


def test_the_engine_names_no_model():
    """It runs a task that is no language model, made of nothing but the protocols."""
    code = (
        "import sys, lmjax.engine.loop; "
        "print([m for m in sys.modules if 'lmjax.models' in m or 'lmjax.data' in m])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert Linear().count_params({"a": np.zeros(3)}) == {"a": 3}


def test_a_run_starts_from_the_parameters_of_another(tmp_path, caplog):
    """Its optimizer, steps and data begin anew; resumed, it goes on from its own checkpoints."""
    first = train(make_run(), tmp_path / "first", **ONE)
    run = make_run(steps=5, init_from=str(tmp_path / "first"), data=Points())
    program = compile_run(run, devices=ONE["devices"])
    state = warm_start.start(run.init_from, run, program)
    jax.tree.map(np.testing.assert_array_equal, state.params, first.params)
    assert int(state.step) == 0
    caplog.clear()
    train(run, tmp_path / "second", **ONE)
    losses = [row["loss"] for row in rows_of(tmp_path / "second")]
    assert losses[0] < 0.5 * rows_of(tmp_path / "first")[0]["loss"]
    caplog.clear()
    train(dataclasses.replace(run, steps=7), tmp_path / "second", **ONE)
    assert "2 parameters are loaded" not in caplog.text
    assert [row["loss"] for row in rows_of(tmp_path / "second")][:5] == losses


def test_a_replica_that_differs_stops_the_run(tmp_path, devices, monkeypatch):
    """Device 1 adds one bit to its copy of a parameter in step 4; comparisons are every 2 steps."""
    run = make_run(layout=Layout(data=4), watch=Watch(replicas_every=2), save_every=2)
    train(run, tmp_path / "sound", devices=devices[:4], quiet=True)

    def broken(program):
        def step(state, batch):
            state, metrics = program.train_step(state, batch)
            if int(state.step) == 4:
                kernel = state.params["kernel"]
                parts = [np.array(x.data) for x in kernel.addressable_shards]
                parts[1].view("u4")[0] ^= 1
                placed = [
                    jax.device_put(part, x.device)
                    for part, x in zip(parts, kernel.addressable_shards, strict=True)
                ]
                odd = jax.make_array_from_single_device_arrays(
                    kernel.shape, kernel.sharding, placed
                )
                state = dataclasses.replace(state, params={**state.params, "kernel": odd})
            return state, metrics

        return dataclasses.replace(program, train_step=step)

    compiled = loop.compile_run
    monkeypatch.setattr(loop, "compile_run", lambda *a, **k: broken(compiled(*a, **k)))
    with pytest.raises(Corrupt, match=r"device 1 .* differs from 3 others, in params/kernel"):
        train(run, tmp_path / "broken", devices=devices[:4], quiet=True)
    assert Corrupt.code == 4
    assert Checkpoints(tmp_path / "broken" / "checkpoints").steps() == [2]
