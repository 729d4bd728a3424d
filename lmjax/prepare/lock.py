"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmjax.data.folder import Folder
from lmjax.errors import UserError

log = logging.getLogger("lmjax")

LOCK = ".lock"
BEAT_S = 20.0  # how often a run says in an object store that it is at work
SILENT_S = 3 * BEAT_S  # after which it is held to be dead
PAUSE_S = 1.0  # between writing the lock and reading it: of two runs the later one has it


@contextlib.contextmanager
def alone(folder: Folder) -> Iterator[None]:
    """Holds the folder for this process; removes what a killed one was in the midst of writing.

    On a disk the system frees the lock of a process that dies. An object store has no locks: there
    a run says every `BEAT_S` seconds that it lives, and one that was killed on another machine
    holds the folder for `SILENT_S` more.

    Raises UserError where another run is at work there.
    """
    if folder.is_remote:
        with _beating(folder):
            yield
        return
    path = Path(folder.path)
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # a system without such locks
            pass
        except BlockingIOError as error:
            raise _taken(folder) from error
        except OSError as error:  # a disk without them, as of some networks
            log.warning("%s cannot be locked (%s): start no second run there", path, error)
        for file in path.rglob(".*.tmp"):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _beating(folder: Folder) -> Iterator[None]:
    own = {"run": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    _wait_for_silence(folder)
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the next may arrive
                folder.write(LOCK, json.dumps({**own, "beat": (number := number + 1)}).encode())

    folder.write(LOCK, json.dumps({**own, "beat": 0}).encode())
    time.sleep(PAUSE_S)
    if (held := _held(folder)) is None or held.get("run") != own["run"]:
        raise _taken(folder)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    for name in folder.names(".*.tmp"):
        (folder / name).remove_all()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError):
            folder.remove([LOCK])


def _wait_for_silence(folder: Folder) -> None:
    """Returns when no run holds the folder; raises UserError where one is at work."""
    first = _held(folder)
    if first is None or _is_dead(first):
        return
    log.info("%s is held by another run: is it at work still?", folder.path)
    end = time.monotonic() + SILENT_S
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENT_S / 10))
        held = _held(folder)
        if held is None or _is_dead(held):
            return
        if held != first:
            raise _taken(folder)


def _held(folder: Folder) -> dict[str, Any] | None:
    try:
        told = json.loads(folder.read(LOCK))
        return told if isinstance(told, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _is_dead(held: dict[str, Any]) -> bool:
    """Whether the run that holds a folder was of this machine, and is no more."""
    if held.get("host") != socket.gethostname() or not isinstance(held.get("pid"), int):
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _taken(folder: Folder) -> UserError:
    return UserError(
        f"another run is at work in {folder.path}: wait for it, or give another --workdir."
    )
