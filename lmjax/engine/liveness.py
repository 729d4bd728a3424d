"""Whether the other processes still live: a connection from each to the first, kept by the kernels.

A process that dies, however it does, closes its connection at once; a host that dies, or is cut
off, no longer answers TCP's keepalive. Neither takes a thread's help, so that a process which is
busy for minutes, compiling, is never taken for a lost one.
"""

from __future__ import annotations

import ctypes
import json
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MEET_S = 20.0  # for a connection to the first process to be made
GATHER_S = 0.3  # in which processes that are lost together are named together

Lost = Callable[[Mapping[int, str]], None]

CLOSED = "its connection ended without a farewell"
SILENT = "its host does not answer"


@dataclass(kw_only=True)
class Liveness:
    """This process's side of the connections; `first` and `other` make one.

    Args:
      process: which this is.
      lost: called once, from a thread, with the reason by lost process.
      silent_s: after how many seconds a host that does not answer counts as lost.
    """

    process: int
    lost: Lost
    silent_s: float
    port: int = 0
    _connections: dict[int, socket.socket] = field(default_factory=dict)
    _left: set[int] = field(default_factory=set)
    _ended: threading.Event = field(default_factory=threading.Event)
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def farewell(self) -> None:
        """From now on the end of this process is no loss to the others, nor theirs to it."""
        self._ended.set()
        self._send({"bye": self.process})

    def tell(self, lost: Mapping[int, str]) -> None:
        """Has the first process tell the others whom it has lost."""
        if self.process == 0:
            self._send({"lost": {str(process): reason for process, reason in lost.items()}})

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._sending:
            for connection in list(self._connections.values()):
                try:
                    connection.sendall(json.dumps(message).encode() + b"\n")
                except OSError:  # that one is gone
                    continue

    def _report(self, lost: Mapping[int, str]) -> None:
        if lost and not self._ended.is_set():
            self._ended.set()
            self.tell(lost)
            self.lost(lost)


def first(token: str, *, lost: Lost, silent_s: float) -> Liveness:
    """Listens, on a free port, for the other processes, which must know the token."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
    here = Liveness(process=0, lost=lost, silent_s=silent_s, port=server.getsockname()[1])
    _in_background(lambda: _listen(here, server, token))
    return here


def other(
    process: int, address: tuple[str, int], token: str, *, lost: Lost, silent_s: float
) -> Liveness:
    """Connects to the first process at (host, port); raises OSError where it cannot be reached."""
    connection = socket.create_connection(address, timeout=MEET_S)
    connection.settimeout(None)
    _keep_alive(connection, silent_s)
    here = Liveness(process=process, lost=lost, silent_s=silent_s, _connections={0: connection})
    here._send({"process": process, "token": token})
    _in_background(lambda: _follow(here, connection))
    return here


def _listen(here: Liveness, server: socket.socket, token: str) -> None:
    """The first process's thread: takes connections, and sees them end."""
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    names: dict[socket.socket, int] = {}
    texts: dict[socket.socket, bytes] = {}
    lost: dict[int, str] = {}
    deadline = 0.0
    while not lost or time.monotonic() < deadline:
        if here._ended.is_set() and not here._connections:
            break
        for key, _ in selector.select(GATHER_S):
            connection: Any = key.fileobj
            if connection is server:
                connection = server.accept()[0]
                _keep_alive(connection, here.silent_s)
                selector.register(connection, selectors.EVENT_READ)
                texts[connection] = b""
                continue
            text, reason = _receive(connection)
            *lines, texts[connection] = (texts[connection] + text).split(b"\n")
            for line in lines:
                message = _parsed(line)
                if message.get("token") == token:
                    names[connection] = message["process"]
                    here._connections[message["process"]] = connection
                elif "bye" in message and connection in names:
                    here._left.add(names[connection])
            if reason:
                selector.unregister(connection)
                connection.close()
                process = names.get(connection)  # none: a stranger, who knows no token
                if process is not None:
                    del here._connections[process]
                    if process not in here._left:
                        lost[process] = reason
                        deadline = deadline or time.monotonic() + GATHER_S
    server.close()
    selector.close()
    here._report(lost)


def _follow(here: Liveness, connection: socket.socket) -> None:
    """Another process's thread: hears of whom the first has lost, or that the first is lost."""
    buffer, reason = b"", ""
    with connection:
        while not reason:
            text, reason = _receive(connection)
            *lines, buffer = (buffer + text).split(b"\n")
            for message in map(_parsed, lines):
                if "bye" in message:
                    return
                if "lost" in message:
                    here._report({int(index): why for index, why in message["lost"].items()})
                    return
        here._report({0: reason})


def _receive(connection: socket.socket) -> tuple[bytes, str]:
    """What has come, and why nothing more will; the latter is '' while the connection stands."""
    try:
        text = connection.recv(65536)
    except (ConnectionResetError, BrokenPipeError):
        return b"", CLOSED
    except OSError:  # timed out, no route: what keepalive finds
        return b"", SILENT
    return text, "" if text else CLOSED


def _parsed(line: bytes) -> dict[str, Any]:
    """A message; {} for what no process of ours has sent, as anyone may connect."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _keep_alive(connection: socket.socket, silent_s: float) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_s = max(1, round(silent_s / 8))
    wanted = {"TCP_KEEPIDLE": 4 * probe_s, "TCP_KEEPINTVL": probe_s, "TCP_KEEPCNT": 4}
    for name, value in wanted.items():
        if hasattr(socket, name):  # macOS lacks one
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def hold_aborts() -> None:
    """Gives this process six seconds for its last words where jax's client aborts it.

    It does a fifth of a second after the coordinator is gone, from a thread that no Python code
    runs in. The handler is C's own `sleep`, whose argument is then the number of SIGABRT.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="liveness", daemon=True).start()
