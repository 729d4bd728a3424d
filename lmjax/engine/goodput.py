"""Where a run's time goes: seconds by kind over all of its launches, and the share that trained.

"Goodput" as in "ML Productivity Goodput" (Google Cloud, 2024): the share of a run's wall time that
went into steps that count. `goodput.jsonl` in the workdir has a line for each launch.

kind        what is counted, in seconds on the host's clock
step        from the first step's dispatch on, all that is none of the others
compile     from the start of the launch to its first step: data, compiling, restoring
input       the devices had nothing to do, as the next batch was not there
checkpoint  the loop waited for a save
evaluation  the loop evaluated
lost        steps that ran again after a restart or a rollback, and the time between a launch that
            did not end as asked (done, or Ctrl-C) and the next
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmjax.engine.lines import read_lines
from lmjax.errors import Exit

log = logging.getLogger("lmjax")

FILE = "goodput.jsonl"
KINDS = ("step", "compile", "input", "checkpoint", "evaluation", "lost")
AS_ASKED = ("done", "Ctrl-C")  # ends after which the time to the next launch is nobody's loss
MAX_MARKS = 32
SECONDS_BETWEEN_WRITES = 10.0
WAITS_BETWEEN_MEASUREMENTS = 100

Seconds = dict[str, float]


class Goodput:
    """A clock that always runs for one kind of time; `spent` says for which.

    Per step it costs a few readings of the clock. The file is written at most every ten seconds, so
    that a kill -9 loses no more; what it loses counts as `lost`.

    The loop is asynchronous: while the host waits for the batch of step n + 1, the devices may
    still run step n. Of a wait, `input` is only the part in which they did not:
      - nothing, where step n still runs when the batch is there;
      - all of it, where step n had ended before the wait began;
      - else what is left of it after step n's end, which nobody saw: its beginning plus the time
        that a step takes, which is measured by waiting for one step's end before taking the next
        batch, once and then at every 100th such wait. Before the first measurement it is nothing.
    So a run that never lacks data is never held up by the measurement. What is seen is this
    process's own lack: where another process's batch is late, the devices wait within the step.

    Args:
      clock: seconds, for durations.
      wall: seconds since the epoch, for what lies between launches.

    Attributes:
      on_beat: is told (the last step dispatched, kind) at every change of kind, if it is set:
        `Watchdog.beat`.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.on_beat: Callable[[int, str], None] | None = None
        self.path: Path | None = None
        self.step = 0
        self.seconds: Seconds = dict.fromkeys(KINDS, 0.0)
        self._clock, self._wall = clock, wall
        self._kind, self._since, self._started = "compile", clock(), wall()
        self._first: int | None = None
        self._marks: list[tuple[int, Seconds]] = []
        self._before: list[dict[str, Any]] = []
        self._past: Seconds = dict.fromkeys(KINDS, 0.0)
        self._rewound: Seconds = dict.fromkeys(KINDS, 0.0)
        self._written = -math.inf
        self._failed = False
        # Of the step dispatched last: its result, when that was, and whether it began at once.
        self._result: Any = None
        self._began, self._began_then = 0.0, False
        self._step_s: float | None = None  # how long a step takes, as measured
        self._measure_next, self._unseen = False, 0

    def __enter__(self) -> Goodput:
        self.beat()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        ended = "done" if kind is None else kind.__name__
        if ended == "KeyboardInterrupt" or getattr(error, "exit_code", 0) == Exit.INTERRUPTED:
            ended = "Ctrl-C"
        self._write(ended)

    def start(self, first: int, path: Path | None = None) -> None:
        """Says how many steps lie behind; goes on from what earlier launches wrote to `path`.

        Without a path nothing is remembered, as by all processes but the first.
        """
        self._first = self.step = first
        self.path = path
        self._before = read_launches(path) if path else []
        self._switch(self._kind)
        self._mark(first)
        self._look_back()
        self._write()

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts the time within as `kind`; within another one, as the inner kind."""
        assert kind in KINDS, kind
        outer, awaited = self._kind, None
        if kind == "input":
            if outer == "compile":
                kind = outer  # the first batch belongs to the start
            elif outer == "step" and self._result is not None:
                awaited = self._result
                self._measure(awaited)
        began = self._switch(kind)
        idle = awaited is not None and awaited.is_ready()
        try:
            yield
        finally:
            ended = self._switch(outer)
            if awaited is not None and not idle:
                busy = self._busy(awaited, began, ended)
                self.seconds["input"] -= busy
                self.seconds["step"] += busy
            if kind == "checkpoint" and self._first is not None:
                self._mark(self.step)
                self._write()

    def dispatched(self, step: int, result: Any) -> None:
        """Notes that `step` was handed to the devices.

        `result` is any `jax.Array` of its metrics: what has `is_ready` and `block_until_ready`.
        """
        before = self._result
        self._began_then = before is None or before.is_ready()
        self._result, self.step = result, step
        self._began = self._switch("step")

    def beat(self) -> None:
        """Tells the watchdog that this kind of time still moves: within a long evaluation."""
        if self.on_beat is not None:
            self.on_beat(self.step, self._kind)

    def rewind(self, step: int) -> None:
        """Goes back to the state after `step`: the time since then is lost."""
        self._switch(self._kind)
        kept = _seconds_at(self._marks, self.step, self.seconds, step)
        for k in KINDS:
            self._rewound[k] += self.seconds[k] - kept[k]
        lost = sum(self.seconds.values()) - sum(kept.values())
        self.seconds = {**kept, "lost": kept["lost"] + lost}
        self._marks = [mark for mark in self._marks if mark[0] < step]
        self._first, self.step = min(self._first or 0, step), step
        self._mark(step)
        self._look_back()
        self._write()

    def training(self) -> tuple[float, float]:
        """Seconds of this launch's training until now: (`step` and `input`, `input` alone).

        What a rollback lost is among them.
        """
        self._switch(self._kind)
        step, lacked = (self.seconds[k] + self._rewound[k] for k in ("step", "input"))
        return step + lacked, lacked

    def now(self) -> float:
        """The clock."""
        return self._clock()

    def total(self) -> Seconds:
        """Seconds by kind, over all launches."""
        self._switch(self._kind)
        return {kind: self._past[kind] + self.seconds[kind] for kind in KINDS}

    def share(self) -> float:
        """The goodput: what `step` is of the time of all kinds, over all launches."""
        total = self.total()
        return total["step"] / max(sum(total.values()), 1e-9)

    def save(self) -> None:
        """Writes the file, unless that was done within the last ten seconds."""
        if self._clock() - self._written > SECONDS_BETWEEN_WRITES:
            self._write()

    def summary(self) -> str:
        """The share and the seconds by kind in one line; kinds below half a second are left out."""
        total = self.total()
        kinds = [f"{k} {duration(total[k])}" for k in KINDS if k == "step" or total[k] >= 0.5]
        launches = len(self._before) + 1
        over = f", over {launches} launches" if launches > 1 else ""
        return f"{100 * self.share():.1f} %: {', '.join(kinds)}{over}"

    def _switch(self, kind: str) -> float:
        now = self._clock()
        self.seconds[self._kind] += now - self._since
        self._since, self._kind = now, kind
        if self.on_beat is not None:
            self.on_beat(self.step, kind)
        return now

    def _measure(self, result: Any) -> None:
        """Where it is due, waits for the step in flight to learn how long a step takes."""
        if self._measure_next and self._began_then and not result.is_ready():
            result.block_until_ready()
            self._step_s = self._clock() - self._began
            self._measure_next = False

    def _busy(self, result: Any, began: float, ended: float) -> float:
        """Of a wait during whose beginning the step before still ran: how long it did."""
        wait = ended - began
        if not result.is_ready():
            return wait
        self._measure_next |= self._unseen % WAITS_BETWEEN_MEASUREMENTS == 0
        self._unseen += 1
        if self._step_s is None:
            return wait
        # A step dispatched while another ran began when that was read, just before this wait.
        step_began = self._began if self._began_then else began
        return min(max(step_began + self._step_s - began, 0.0), wait)

    def _mark(self, step: int) -> None:
        """Remembers the seconds at a step from which a restart may go on."""
        self._marks.append((step, dict(self.seconds)))
        if len(self._marks) > MAX_MARKS:
            self._marks = self._marks[:-2:2] + self._marks[-2:]

    def _look_back(self) -> None:
        launches = [*self._before, self._launch()]
        together = account(launches)
        self._past = {kind: together[kind] - self.seconds[kind] for kind in KINDS}

    def _launch(self, ended: str | None = None) -> dict[str, Any]:
        return {
            "started": self._started,
            "written": self._wall(),
            "first": self._first,
            "step": self.step,
            "ended": ended,
            "seconds": _rounded(self.seconds),
            "marks": [[step, _rounded(seconds)] for step, seconds in self._marks],
        }

    def _write(self, ended: str | None = None) -> None:
        """Replaces the file as a whole. A full disk is said once: it must not end the run here."""
        self._written = self._switch(self._kind)
        if self.path is None or self._first is None:
            return
        lines = [json.dumps(launch) + "\n" for launch in [*self._before, self._launch(ended)]]
        new = self.path.with_suffix(".tmp")
        try:
            new.write_text("".join(lines))
            new.replace(self.path)
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written: %s", self.path, error.strerror)
            self._failed = True


def read_launches(path: Path) -> list[dict[str, Any]]:
    """The lines of a `goodput.jsonl`; one that is damaged is left out, with a warning."""
    launches = []
    for number, launch in enumerate(read_lines(path), 1):
        try:
            if launch is None:
                raise ValueError
            account([launch, launch])
            launches.append(launch)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            log.warning("line %d of %s is damaged and left out", number, path)
    return launches


def account(launches: Sequence[Mapping[str, Any]]) -> Seconds:
    """Seconds by kind of a run's launches, in their order; what a later one ran again is `lost`.

    A launch that went on from step s keeps what the ones before it had spent until step s. Between
    the steps at which checkpoints were saved that is interpolated.
    """
    total = dict.fromkeys(KINDS, 0.0)
    cut = math.inf  # the least step at which a later launch began
    after: Mapping[str, Any] | None = None
    for launch in reversed(launches):
        marks = [(step, _complete(seconds)) for step, seconds in launch["marks"]]
        seconds = _complete(launch["seconds"])
        kept = _seconds_at(marks, launch["step"], seconds, cut)
        for kind in KINDS:
            total[kind] += kept[kind]
        total["lost"] += sum(seconds.values()) - sum(kept.values())
        if after is not None and launch["ended"] not in AS_ASKED:
            total["lost"] += max(after["started"] - launch["written"], 0.0)
        cut, after = min(cut, launch["first"]), launch
    return total


def duration(seconds: float) -> str:
    """As 1h02m or 2m03s."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _seconds_at(
    marks: Sequence[tuple[int, Seconds]], last: int, seconds: Seconds, step: float
) -> Seconds:
    """What of a launch's seconds was spent until `step`; `seconds` are those until step `last`."""
    if step >= last:
        return dict(seconds)
    points = [*marks, (last, seconds)]
    if step <= points[0][0]:
        return dict(points[0][1])
    upper = next(i for i, (at, _) in enumerate(points) if at > step)
    (low, before), (high, after) = points[upper - 1], points[upper]
    part = (step - low) / (high - low)
    return {kind: before[kind] + part * (after[kind] - before[kind]) for kind in KINDS}


def _complete(seconds: Mapping[str, float]) -> Seconds:
    return {kind: float(seconds.get(kind, 0.0)) for kind in KINDS}


def _rounded(seconds: Seconds) -> Seconds:
    return {kind: round(value, 3) for kind, value in seconds.items()}
