"""Kinds of time add up; what the devices lacked is what a simulated device lacked; restarts."""

import json
import random
import time

import jax
import jax.numpy as jnp
import pytest

from lmjax.engine.goodput import KINDS, MAX_MARKS, Goodput, account, duration, read_launches


class Device:
    """A clock that only moves when told to, and a device that runs steps one after the other."""

    def __init__(self):
        self.time, self.free = 0.0, 0.0

    def clock(self):
        return self.time

    def wall(self):
        return 1e9 + self.time

    def dispatch(self, seconds):
        self.free = max(self.free, self.time) + seconds
        return Step(self, self.free)


class Step:
    def __init__(self, device, ends):
        self.device, self.ends, self.waits = device, ends, 0

    def is_ready(self):
        return self.device.time >= self.ends

    def block_until_ready(self):
        self.waits += 1
        self.device.time = max(self.device.time, self.ends)


def goodput(device):
    return Goodput(clock=device.clock, wall=device.wall)


def train(clock, device, waits, *, step_s=1.0, first=0, after=lambda step: None):
    """The loop: takes a batch, dispatches, reads the step before; returns what the device lacked.

    `waits` are how long the batches take; those of the first steps say nothing of starvation.
    """
    lacked, before, results = 0.0, None, []
    for step, wait in enumerate(waits, first + 1):
        free = device.free
        with clock.spent("input"):
            began = device.time
            device.time += wait
        if before is not None:
            lacked += max(0.0, device.time - max(began, free))
        result = device.dispatch(step_s)
        clock.dispatched(step, result)
        results.append(result)
        device.time += 0.01  # the host's own work
        if before is not None:
            device.time = max(device.time, before.ends)
        before = result
        after(step)
    return lacked, results


@pytest.mark.parametrize("seed", range(5))
def test_input_is_what_the_device_lacked(seed):
    """Waits from none to long, at random: exact but for the waits before the first measurement."""
    rng = random.Random(seed)
    device = Device()
    clock = goodput(device)
    clock.start(0)
    slow = rng.choice([0.2, 0.6, 0.9])
    waits = [rng.choice([0.0, rng.uniform(0, 1), rng.uniform(1, 4)]) for _ in range(400)]
    waits = [w if rng.random() < slow else 0.0 for w in waits]
    lacked, results = train(clock, device, waits)
    assert sum(clock.total().values()) == pytest.approx(device.time)
    assert 0 <= lacked - clock.seconds["input"] <= 4  # one wait

    assert lacked > 30
    assert sum(r.waits for r in results) <= 1 + len(waits) // 100


def test_input_is_exact_once_a_step_is_measured():
    device = Device()
    clock = goodput(device)
    clock.start(0)
    rng = random.Random(0)
    train(clock, device, [3.0] * 5)
    before = clock.seconds["input"]
    rest = [rng.uniform(0, 3) for _ in range(90)]
    lacked, results = train(clock, device, rest, first=5)
    lacked += 3.0 - (1.0 - 0.01)  # of the first wait, which the simulation leaves out
    lacked += max(0.0, rest[0] - 3.0) - max(0.0, 3.0 - rest[0])
    assert clock.seconds["input"] - before == pytest.approx(lacked)
    assert not any(r.waits for r in results)


def test_data_that_is_always_there_costs_no_wait():
    """Reading ahead within a step's time is no starvation, however long it takes."""
    device = Device()
    clock = goodput(device)
    clock.start(0)
    lacked, results = train(clock, device, [5.0] + [0.9] * 50)
    assert lacked == clock.seconds["input"] == 0
    assert not any(r.waits for r in results)
    assert clock.seconds["compile"] == pytest.approx(5.0)  # the first batch belongs to the start
    assert clock.total()["step"] == pytest.approx(device.time - 5.0)


def test_with_real_arrays():
    step = jax.jit(lambda x: x + 1)
    x = step(jnp.zeros(()))
    clock = Goodput()
    clock.start(0)
    for number in range(1, 12):
        with clock.spent("input"):
            time.sleep(0.03)
        x = step(x)
        clock.dispatched(number, x)
    assert clock.training()[1] >= 0.03 * 8
    assert clock.seconds["step"] > 0


def test_kinds_nest_and_add_up():
    device = Device()
    clock = goodput(device)
    beats = []
    clock.on_beat = lambda step, kind: beats.append((step, kind))
    device.time = 2.0
    clock.start(0)
    with clock.spent("evaluation"):
        device.time += 1
    device.time += 1
    clock.dispatched(1, device.dispatch(0))
    device.time += 10
    assert clock.training() == (10.0, 0.0)
    with clock.spent("evaluation"):
        device.time += 3
        with clock.spent("checkpoint"):
            device.time += 0.5
        clock.beat()
        assert beats[-1] == (1, "evaluation")
        device.time += 2
    device.time += 5
    with pytest.raises(KeyError), clock.spent("checkpoint"):
        device.time += 1
        raise KeyError
    assert beats[-1] == (1, "step")
    assert clock.total() == {
        "step": 15.0, "compile": 3.0, "input": 0.0,
        "checkpoint": 1.5, "evaluation": 6.0, "lost": 0.0,
    }  # fmt: skip
    assert clock.share() == pytest.approx(15 / 25.5)
    assert (
        clock.summary() == "58.8 %: step 0m15s, compile 0m03s, checkpoint 0m01s, evaluation 0m06s"
    )


def launch(device, path, *, first, steps, save_every, rng, ended=None, start_s=4.0):
    """A launch of steps of random lengths; returns seconds by (step, kind), and the last save."""
    clock = goodput(device)
    device.time += start_s
    clock.start(first, path)
    took = {(first, "compile"): start_s}
    saved = first

    def spend(kind, step, seconds):
        took[step, kind] = took.get((step, kind), 0.0) + seconds
        device.time += seconds

    clock.dispatched(first, device.dispatch(0))
    for step in range(first + 1, first + steps + 1):
        clock.dispatched(step, device.dispatch(0))
        spend("step", step, rng.uniform(0.5, 2))
        if step % save_every == 0:
            with clock.spent("checkpoint"):
                spend("checkpoint", step, rng.uniform(0.1, 1))
            saved = step
    if ended == "killed":
        clock.save()
        clock._write()
    else:
        clock.__exit__(*ended)
    return took, saved, clock


DONE, CTRL_C = (None, None, None), (KeyboardInterrupt, KeyboardInterrupt(), None)


@pytest.mark.parametrize("seed", range(4))
def test_restarts_against_a_list_of_all_seconds(tmp_path, seed):
    """Killed at random steps, resumed from random saves: the file says what a full list says."""
    rng, device, path = random.Random(seed), Device(), tmp_path / "goodput.jsonl"
    kept, lost, first = {}, 0.0, 0
    launches = 6
    for number in range(launches):
        for key in [k for k in kept if k[0] > first]:
            lost += kept.pop(key)
        steps, last = rng.randint(3, 30), number == launches - 1
        took, saved, clock = launch(
            device, path, first=first, steps=steps, save_every=5, rng=rng,
            ended=DONE if last else "killed",
        )  # fmt: skip
        for key, seconds in took.items():
            kept[key] = kept.get(key, 0.0) + seconds
        if not last:
            first = saved
            if rng.random() < 0.3 and first >= 5:  # the newest checkpoint turned out damaged
                first -= 5
            pause = rng.uniform(0, 20)
            device.time += pause
            lost += pause
    total = account(read_launches(path))
    assert total == pytest.approx(clock.total(), abs=0.05)
    assert sum(total.values()) == pytest.approx(device.time, abs=0.05)
    assert total["lost"] == pytest.approx(lost, abs=0.05)
    for kind in ("step", "compile", "checkpoint"):
        seconds = sum(s for (_, k), s in kept.items() if k == kind)
        assert total[kind] == pytest.approx(seconds, abs=0.05), kind
    assert clock.summary().endswith(", over 6 launches")


@pytest.mark.parametrize(
    ("ended", "lost"),
    [(DONE, 0.0), (CTRL_C, 0.0), ((OSError, OSError(), None), 100.0), ("killed", 100.0)],
)
def test_the_time_until_the_next_launch_is_lost_unless_it_was_asked_for(tmp_path, ended, lost):
    rng, device, path = random.Random(0), Device(), tmp_path / "goodput.jsonl"
    launch(device, path, first=0, steps=5, save_every=5, rng=rng, ended=ended)
    device.time += 100
    _, _, clock = launch(device, path, first=5, steps=5, save_every=5, rng=rng, ended=DONE)
    assert clock.total()["lost"] == pytest.approx(lost, abs=0.01)
    how = {0.0: ("done", "Ctrl-C"), 100.0: ("OSError", None)}[lost]
    assert read_launches(path)[0]["ended"] in how


def test_a_rollback_loses_what_came_after_the_checkpoint(tmp_path):
    device, path = Device(), tmp_path / "goodput.jsonl"
    clock = goodput(device)
    clock.start(0, path)

    def save(step):
        if step % 4 == 0:
            with clock.spent("checkpoint"):
                device.time += 2.0

    train(clock, device, [0.0] * 11, after=save)
    trained = clock.training()[0]
    at_8 = next(seconds for step, seconds in clock._marks if step == 8)
    lost = device.time - sum(at_8.values())
    clock.rewind(8)
    assert clock.total() == pytest.approx({**at_8, "lost": lost})
    assert clock.training()[0] == pytest.approx(trained)  # it does not go backwards
    train(clock, device, [0.0] * 4, first=8, after=save)
    assert clock.total()["lost"] == pytest.approx(lost)
    clock.rewind(0)  # further back than what was lost before
    assert clock.total()["lost"] == pytest.approx(device.time)
    assert sum(clock.total().values()) == pytest.approx(device.time)
    assert read_launches(path)[-1]["step"] == 0


def test_marks_are_thinned_and_interpolated(tmp_path):
    device, path = Device(), tmp_path / "goodput.jsonl"
    clock = goodput(device)
    clock.start(0, path)
    clock.dispatched(0, device.dispatch(0))
    for step in range(1, 1001):
        clock.dispatched(step, device.dispatch(0))
        device.time += 1
        with clock.spent("checkpoint"):
            pass
    (line,) = read_launches(path)
    assert len(line["marks"]) <= MAX_MARKS
    assert path.stat().st_size < 8000
    for first in (0, 1, 500, 999, 1000):
        later = {**line, "first": first, "started": line["written"], "seconds": {}, "marks": []}
        total = account([line, {**later, "step": first, "ended": "done"}])
        assert total["step"] == pytest.approx(first)
        assert total["lost"] == pytest.approx(1000 - first)


def test_it_is_written_at_most_every_ten_seconds(tmp_path):
    device, path = Device(), tmp_path / "goodput.jsonl"
    clock = goodput(device)
    clock.start(0, path)
    clock.dispatched(1, device.dispatch(0))
    seen = []
    for _ in range(100):
        device.time += 0.5
        clock.save()
        seen.append(path.read_text())
    assert len(set(seen)) == 5
    assert json.loads(seen[-1])["seconds"]["step"] == pytest.approx(42)


def test_damaged_lines_are_left_out_and_said(tmp_path, caplog):
    rng, device, path = random.Random(0), Device(), tmp_path / "goodput.jsonl"
    launch(device, path, first=0, steps=5, save_every=5, rng=rng, ended=DONE)
    whole = path.read_text()
    for bad in ('{"started": 1', "[]", '{"marks": 3}', "\x00", '{"marks": [], "seconds": []}'):
        caplog.clear()
        path.write_text(bad + "\n" + whole)
        assert len(read_launches(path)) == 1
        assert "line 1 of" in caplog.text and "damaged" in caplog.text


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path, caplog):
    clock = Goodput()
    clock.start(0, tmp_path / "gone" / "goodput.jsonl")
    clock._write()
    clock.__exit__(None, None, None)
    assert caplog.text.count("cannot be written") == 1


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Goodput() as clock:
        clock.start(0)
        assert set(clock.total()) == set(KINDS)
    assert not list(tmp_path.iterdir())


def test_durations():
    assert [duration(s) for s in (0.4, 59, 61, 3725)] == ["0m00s", "0m59s", "1m01s", "1h02m"]
