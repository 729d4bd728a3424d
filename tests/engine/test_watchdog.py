"""A loop that hangs is written down and ended; starvation and growth are told, and only these."""

import logging
import math
import mmap
import multiprocessing
import random
import resource
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lmjax.engine.watchdog import Growth, Health, Watch, Watchdog, host_memory_gb
from lmjax.errors import Exit, UserError
from tests.engine.test_goodput import Device, goodput, train

SCRIPT = """
import ctypes, sys, threading, time
from pathlib import Path
from lmjax.engine.watchdog import Watch, Watchdog

def waits_in_c():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def holds_the_interpreter():
    ctypes.PyDLL(None).sleep(60)  # as ctypes.CDLL does not

def fail(error, code):
    print(f"told: {error}", file=sys.stderr)
    sys.exit(code)  # ends a thread only, as distributed.fail does in a run of one process

how, limit = sys.argv[1], float(sys.argv[2])
with Watchdog(Watch(stall_s=limit), Path(sys.argv[3]), process=3, end=fail) as watchdog:
    for step in range(4):
        watchdog.beat(step, "step")
        time.sleep(limit / 3)
    watchdog.beat(4, "input")
    globals()[how]()
"""


def hang(how, limit, workdir):
    command = [sys.executable, "-c", SCRIPT, how, str(limit), str(workdir)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    return done, (workdir / "stalls/process3.txt").read_text(), time.monotonic() - began


def test_a_hang_in_c_is_written_down_and_ended(tmp_path):
    done, text, seconds = hang("waits_in_c", 1.0, tmp_path)
    assert done.returncode == Exit.AGAIN == 75
    assert "process 3, after step 4: nothing has moved for 1 s, in input" in done.stderr
    assert f"Where every thread stands: {tmp_path}/stalls/process3.txt" in done.stderr
    assert "told: process 3, after step 4: nothing has moved for 2 s, in input" in done.stderr
    assert "in waits_in_c" in text and "is MainThread" in text and "is watchdog" in text
    assert seconds >= 2 + 4 / 3  # twice the limit after the last beat


def test_a_hang_that_lets_no_other_thread_run_is_written_down_and_ended(tmp_path):
    done, text, seconds = hang("holds_the_interpreter", 0.5, tmp_path)
    assert done.returncode == Exit.ERROR
    assert "in holds_the_interpreter" in text
    assert seconds >= 1 + 4 * 0.5 / 3


def test_what_moves_again_goes_on(tmp_path, caplog):
    watch = Watch(stall_s=0.4, stall_exit=False)
    path = tmp_path / "stalls/process0.txt"
    with Watchdog(watch, tmp_path) as watchdog:
        for round in (1, 2):
            watchdog.beat(7 * round, "evaluation")
            deadline = time.monotonic() + 30
            while caplog.text.count("nothing has moved") < round and time.monotonic() < deadline:
                time.sleep(0.05)
        watchdog.beat(15, "step")
        while caplog.text.count("moves again") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    words = [r.getMessage().split(":")[0] for r in caplog.records]
    after = ["process 0, after step " + n for n in ("7", "14", "14", "15")]
    assert words == after
    assert path.read_text().count("in evaluation") == 2
    assert "test_what_moves_again_goes_on" in path.read_text()


@pytest.mark.parametrize("stall_s", [0.0, 0.3])
def test_a_run_that_moves_leaves_nothing(tmp_path, stall_s):
    threads = threading.active_count()
    with Watchdog(Watch(stall_s=stall_s), tmp_path) as watchdog:
        assert threading.active_count() == threads + bool(stall_s)
        for step in range(8):
            watchdog.beat(step, "step")
            time.sleep(0.05)
    assert threading.active_count() == threads
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stall_s": -1.0}, "stall_s is -1.0"),
        ({"stall_s": math.inf}, "stall_s is inf"),
        ({"growth_gb": math.nan}, "growth_gb is nan"),
        ({"starved": 0.0}, "starved is 0.0: give a share above 0"),
        ({"starved": 1.5}, "starved is 1.5"),
    ],
)
def test_limits_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Watch(**change)


def health(device, process=None, memory=lambda: 1.0, **limits):
    clock = goodput(device)
    clock.start(0)
    return clock, Health(Watch(**limits), clock, process=process, memory_gb=memory)


def test_starvation_is_measured_and_told_once(caplog):
    device = Device()
    clock, watched = health(device)
    rows = []
    step_s, wait_s = 0.99, 2.0  # the host's own work takes 0.01
    train(
        clock, device, [60.0] + [wait_s] * 80, step_s=step_s,
        after=lambda step: step % 5 == 0 and rows.append(watched.look(step)),
    )  # fmt: skip
    shares = [row["input_share"] for row in rows]
    lacked = wait_s + 0.01 - step_s
    assert shares[1:] == pytest.approx([lacked / (wait_s + 0.01)] * 15, rel=0.02)
    assert caplog.text.count("the devices lacked data") == 1
    assert "in steps 6 to 25 the devices lacked data for 51% of the time (1020 ms" in caplog.text
    assert rows[-1]["goodput"] == pytest.approx(clock.share(), abs=0.01)
    assert rows[-1]["host_memory_gb"] == 1.0


@pytest.mark.parametrize(
    "waits",
    [
        [60.0] + [0.9] * 100,  # a slow start, then reading ahead
        ([0.0] * 39 + [3.0]) * 3,  # a hiccup now and then: 2 of 42 seconds
        [5.0] * 15,  # too short to say
    ],
)
def test_what_is_no_starvation_is_not_told(caplog, waits):
    device = Device()
    clock, watched = health(device)
    train(clock, device, waits, after=watched.look)
    assert not caplog.text


def test_other_processes_speak_of_themselves_and_above_the_level_of_their_log(caplog):
    for process, level in ((None, logging.WARNING), (0, logging.WARNING), (2, logging.ERROR)):
        caplog.clear()
        device = Device()
        clock, watched = health(device, process=process)
        train(clock, device, [3.0] * 60, after=watched.look)
        (record,) = caplog.records
        assert record.levelno == level
        assert record.getMessage().startswith("" if process is None else f"process {process}: in")


def test_growing_memory_is_told(caplog):
    device = Device()
    clock, watched = health(device, memory=lambda: 3 + device.time / 1000, growth_gb=2.0)
    train(clock, device, [0.0] * 6000, after=lambda step: step % 10 == 0 and watched.look(step))
    assert 1 <= caplog.text.count("memory has grown by 2.") <= 3


def samples(limit, value, *, hours=10.0, every_s=10.0, seed=0):
    """The times at which growth is told of `value(seconds, noise)`."""
    growth, rng = Growth(limit), random.Random(seed)
    told = []
    for number in range(int(3600 * hours / every_s)):
        seconds = number * every_s
        if growth.add(seconds, value(seconds, rng)):
            told.append(seconds / 3600)
    return told


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("every_s", [0.5, 20.0, 300.0])
def test_a_leak_is_told(every_s, seed):
    """1 GB an hour beside noise and peaks of many GB: told within 2 hours of having grown 2 GB."""

    def leak(seconds, rng):
        peak = 20 if rng.random() < 0.2 else 0
        return 8 + 6 * (1 - math.exp(-seconds / 60)) + seconds / 3600 + rng.gauss(0, 0.1) + peak

    told = samples(2.0, leak, every_s=every_s, seed=seed)
    assert 2 <= told[0] <= 4.5
    assert len(told) >= 2  # and again


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("every_s", [0.5, 20.0, 300.0])
def test_warming_up_steps_and_peaks_are_no_leak(every_s, seed):
    def warms_up(seconds, rng):
        compiled = sum(3 * (seconds > after) for after in (1800, 3600, 9000))  # for the first time
        cache = 10 * (1 - math.exp(-seconds / 300))
        peak = 8 if rng.random() < 0.1 else 0
        return 8 + compiled + cache + peak + rng.gauss(0, 0.2)

    assert samples(2.0, warms_up, every_s=every_s, seed=seed) == []


def test_no_limit_tells_of_nothing():
    assert samples(0.0, lambda seconds, rng: seconds) == []


def test_host_memory_counts_what_was_written_and_no_mapped_file(tmp_path):
    (tmp_path / "corpus").write_bytes(b"x" * 100_000_000)
    before = host_memory_gb()
    written = np.ones(200_000_000, np.uint8)
    assert host_memory_gb() - before == pytest.approx(0.2, abs=0.05)
    with (tmp_path / "corpus").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert np.frombuffer(mapped, np.uint8)[::4096].sum() > 0
        assert host_memory_gb() - before == pytest.approx(0.2, abs=0.05)
    assert written[0] == 1


def test_host_memory_counts_processes_that_read_data(monkeypatch):
    code = "x = b'x' * 100_000_000; print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        child.stdout.readline()
        before = host_memory_gb()
        gone = SimpleNamespace(pid=2**30)
        children = [SimpleNamespace(pid=child.pid), gone]
        monkeypatch.setattr(multiprocessing, "active_children", lambda: children)
        assert host_memory_gb() - before == pytest.approx(0.11, abs=0.03)
        child.communicate(b"\n")


def test_without_proc_the_largest_size_is_given(monkeypatch):
    monkeypatch.setattr("lmjax.engine.watchdog.STATM", "/nowhere/{pid}")
    assert 0.9 < host_memory_gb() / (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6) < 1.1
