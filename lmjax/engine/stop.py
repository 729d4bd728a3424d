"""Requests to stop a run: SIGINT and SIGTERM, obeyed after a step that all processes agree on."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from lmjax.engine.distributed import stop_agreed

log = logging.getLogger("lmjax")


class Stop:
    """What was asked for so far; `signals` makes one that listens."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._agreed = False
        self._times = 0
        self._step = -1

    def asked(self) -> bool:
        """Whether to stop, of many processes all or none; each must ask equally often."""
        if jax.process_count() == 1:
            return bool(self.received)
        self._times += 1  # no step number, as it is also asked within an evaluation
        self._agreed = self._agreed or stop_agreed(self._times)
        return self._agreed

    def after(self, step: int) -> bool:
        """Whether the run stops after this step; however often it is called for it, asked once."""
        if jax.process_count() == 1:
            return bool(self.received)
        if step != self._step:
            self._step = step
            self.asked()
        return self._agreed

    @property
    def signum(self) -> int:
        """The signal that this process got; SIGTERM where another one got it."""
        return self.received[0] if self.received else signal.SIGTERM


@contextmanager
def signals() -> Iterator[Stop]:
    """Collects SIGINT and SIGTERM; a second one acts at once, as if nothing had caught it.

    Of many processes, jax takes SIGTERM and tells the others; SIGINT is handed on as one.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # a notebook's worker thread cannot take signals
        return
    many = jax.process_count() > 1

    def on_signal(signum: int, frame: Any) -> None:
        del frame
        if stop.received:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        stop.received.append(signum)
        if many:
            signal.raise_signal(signal.SIGTERM)
        log.warning(
            "%s: saving after this step; once more to stop at once", signal.Signals(signum).name
        )

    caught = (signal.SIGINT,) if many else (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, on_signal) for s in caught}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
