"""Processes of this machine that run tasks, one after another, for as long as a run lasts.

A process reads frames from its input and answers on its output, each a length of 8 bytes and so
many bytes: a packed task in, what it brought back out. It ends when its input does, so that none
outlives the run, however that ends. Starting one costs half a second of processor time and loading
tables and tokenizers as much again, which engines that start them anew for each step pay each time.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_LENGTH = struct.Struct("<Q")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Processes:
    """At most `limit` processes, started when they are first needed; safe to use from threads."""

    def __init__(self, limit: int) -> None:
        self._free: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(limit):
            self._free.put(None)

    def run(self, packed: bytes) -> bytes:
        """What a packed task brings back; waits for a process that is free.

        Raises RuntimeError where the process dies of it, of memory as a rule.
        """
        with self._process() as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                _send(process.stdin, packed)
                return _receive(process.stdout)
            except (OSError, EOFError) as error:
                raise RuntimeError(
                    f"a process ended with code {process.wait()} while it ran a task. Code -9 is "
                    "how a system ends those that take its memory: give fewer --workers, or "
                    "smaller shards."
                ) from error

    def close(self) -> None:
        """Ends the processes that are free."""
        while not self._free.empty():
            _end(self._free.get_nowait())

    @contextmanager
    def _process(self) -> Iterator[subprocess.Popen[bytes]]:
        process = self._free.get()
        try:
            if process is None:
                process = _start()
            yield process
        except BaseException:  # it may be in the midst of an answer: the next task gets another
            _end(process)
            process = None
            raise
        finally:
            self._free.put(process)


def _start() -> subprocess.Popen[bytes]:
    """A process that imports what this one can."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.communicate()


def _send(file: IO[bytes], data: bytes) -> None:
    file.write(_LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def _receive(file: IO[bytes]) -> bytes:
    """The next frame; raises EOFError where the other side is gone."""
    (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size))
    return _exactly(file, length)


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _serve() -> None:
    from lmjax.prepare.backends import run_packed

    if sys.platform == "linux":  # a task that goes on where its run was killed disturbs the next
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    # What a stage prints goes to the run's errors: the output speaks in frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks = sys.stdin.buffer
    while True:
        try:
            packed = _receive(tasks)
        except EOFError:
            return
        _send(answers, run_packed(packed))


if __name__ == "__main__":
    try:
        _serve()
    except (KeyboardInterrupt, BrokenPipeError):  # whoever started it was stopped, and says so
        os._exit(1)
