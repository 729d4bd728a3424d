"""Connections between processes, here all within one: who is told of whose end."""

import queue
import socket
import subprocess
import sys
import time

import pytest

from lmjax.engine import liveness

WAIT_S = 30
QUIET_S = 1.0  # in which a wrong alarm would come
CLOSED = "its connection ended without a farewell"


class Group:
    """The first process and others; `heard` collects (who, whom they lost)."""

    def __init__(self, count):
        self.heard = queue.Queue()
        self.first = liveness.first("secret", lost=self.listener(0), silent_s=20)
        self.others = {i: self.join(i) for i in range(1, count)}
        self.wait(count - 1)

    def listener(self, index):
        return lambda lost: self.heard.put((index, dict(lost)))

    def join(self, index, token="secret"):
        address = ("localhost", self.first.port)
        return liveness.other(index, address, token, lost=self.listener(index), silent_s=20)

    def wait(self, count):
        deadline = time.monotonic() + WAIT_S
        while len(self.first._connections) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.first._connections) == count

    def cut(self, index):
        """What the kernel does when the process dies."""
        self.others[index]._connections[0].shutdown(socket.SHUT_RDWR)

    def next(self, number):
        return sorted(self.heard.get(timeout=WAIT_S) for _ in range(number))

    def silent(self):
        with pytest.raises(queue.Empty):
            self.heard.get(timeout=QUIET_S)

    def end(self):
        for member in (self.first, *self.others.values()):
            member.farewell()


@pytest.fixture
def group():
    """Of four processes."""
    made = Group(4)
    yield made
    made.end()


def test_the_end_of_one_is_told_to_all(group):
    group.cut(2)
    heard = dict(group.next(4))
    assert [heard[i] for i in (0, 1, 3)] == [{2: CLOSED}] * 3
    group.silent()


def test_two_that_end_together_are_named_together(group):
    group.cut(1)
    group.cut(3)
    heard = dict(group.next(4))
    assert [heard[i] for i in (0, 2)] == [{1: CLOSED, 3: CLOSED}] * 2


def test_the_end_of_the_first_is_seen_by_all_others(group):
    for connection in list(group.first._connections.values()):
        connection.shutdown(socket.SHUT_RDWR)
    assert [lost for index, lost in group.next(4) if index] == [{0: CLOSED}] * 3


def test_after_a_farewell_nobody_is_lost(group):
    group.others[2].farewell()
    time.sleep(0.1)
    group.cut(2)
    group.silent()
    group.end()
    group.silent()


def test_strangers_are_neither_heard_nor_missed(group):
    for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"process": 3, "token": "guess"}\n{"bye": 1}\n'):
        with socket.create_connection(("localhost", group.first.port)) as stranger:
            stranger.sendall(text)
    group.silent()
    assert sorted(group.first._connections) == [1, 2, 3]


def test_a_first_process_that_cannot_be_reached():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError):
        liveness.other(1, ("localhost", port), "x", lost=print, silent_s=20)


def test_an_abort_leaves_time_for_last_words():
    code = """
import ctypes, os, threading, time
from lmjax.engine.liveness import hold_aborts
hold_aborts()
threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
time.sleep(0.5)
os._exit(75)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == 75
