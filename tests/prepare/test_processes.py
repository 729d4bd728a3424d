"""Processes that stay: tasks come back, what they raise too, and a dead one is replaced."""

from __future__ import annotations

import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmjax.prepare.backends import pack, unpacked
from lmjax.prepare.backends.processes import Processes
from lmjax.prepare.tasks import Done

pytest.importorskip("cloudpickle")


@dataclass
class Tells:
    """A task that brings back its process, prints, fails, dies, or waits."""

    what: str = ""

    def run(self) -> Done:
        print("printed by a stage")
        if self.what == "fail":
            raise ValueError("on purpose")
        if self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "wait":
            time.sleep(0.5)
        return Done(seconds={"pid": (os.getpid(), len(os.environ["PYTHONPATH"]))})


def pid(answer: bytes) -> int:
    return int(unpacked([answer])[0].seconds["pid"][0])


def test_a_process_stays_and_is_replaced_when_it_dies():
    processes = Processes(1)
    first = pid(processes.run(pack(Tells())))
    assert first != os.getpid()
    with pytest.raises(RuntimeError, match="ValueError: on purpose"):
        unpacked([processes.run(pack(Tells("fail")))])
    assert pid(processes.run(pack(Tells()))) == first
    with pytest.raises(RuntimeError, match="ended with code -9"):
        processes.run(pack(Tells("die")))
    second = pid(processes.run(pack(Tells())))
    assert second != first
    processes.close()
    assert not Path(f"/proc/{second}").exists()


@pytest.mark.slow
def test_as_many_tasks_run_at_once_as_there_are_processes():
    processes = Processes(2)
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(processes.run, [pack(Tells("wait")) for _ in range(6)]))
    assert len({pid(answer) for answer in answers}) == 2
    assert all(pickle.loads(answer).outcomes == {} for answer in answers)
    processes.close()
