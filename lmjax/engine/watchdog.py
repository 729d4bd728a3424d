"""What watches a run from beside it: a loop that stands still, devices without data, memory."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import math
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lmjax.errors import Exit, UserError

if TYPE_CHECKING:
    from lmjax.engine.goodput import Goodput

log = logging.getLogger("lmjax")

FOLDER = "stalls"
STATM = "/proc/{pid}/statm"
LAST_WORDS_S = 60.0  # for telling the other processes, and for flushing, where these hang too
WINDOW_STEPS, WINDOW_S = 20, 10.0  # starvation is judged over no less
MAX_MINIMA, LAST_MINIMA = 16, 8


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is watched in a run, and from where on it is said.

    Args:
      stall_s: after so many seconds without any progress the stacks of all threads are written to
        `stalls/processN.txt` in the workdir; 0 for never. A step, an evaluation's batch and a save
        are progress, compiling is not: more than the longest of them.
      stall_exit: whether the process ends (code 75: start it again) after as long once more.
      starved: a share of the time in which the devices lack data; above it there is a warning.
      growth_gb: a warning follows when the host's memory has grown by so much and still does; 0 for
        none.
      replicas_every: steps between comparisons of the parameters on devices that hold the same part
        of them (`engine.replicas`); 0 for none.
    """

    stall_s: float = 1800.0
    stall_exit: bool = True
    starved: float = 0.1
    growth_gb: float = 2.0
    replicas_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("stall_s", "growth_gb", "replicas_every"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"{name} is {value}: give a number, or 0 for none.")
        if not 0 < self.starved <= 1:
            raise UserError(f"starved is {self.starved}: give a share above 0; 1 for no warning.")


class Stalled(Exception):
    """Nothing moved for too long."""


class Watchdog:
    """A thread that looks whether the loop has moved, and writes down where it stands if not.

    It runs while the main thread hangs in C, in a collective or a read, as these let go of the
    interpreter. Where C code hangs and does not, a second thread that needs no interpreter
    (`faulthandler.dump_traceback_later`) writes the stacks after twice `stall_s`, and ends the
    process with code 1, the only one it knows. It counts the time in which a process is stopped
    (SIGSTOP, Ctrl-Z) as well.

    Args:
      watch: the limits.
      workdir: where `stalls/` is made.
      process: the number of this one.
      end: is called with the error and the exit code before the process ends, to tell the others:
        `distributed.fail`. By default the error is printed.
    """

    def __init__(
        self,
        watch: Watch,
        workdir: Path,
        *,
        process: int = 0,
        end: Callable[[Exception, int], Any] | None = None,
    ) -> None:
        self.watch, self.process = watch, process
        self.path = workdir / FOLDER / f"process{process}.txt"
        self._end = end or _print
        self._last: tuple[int, str, float] = (0, "start", time.monotonic())
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> Watchdog:
        if self.watch.stall_s:
            self._last = (*self._last[:2], time.monotonic())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a")  # now: a stalled machine may open nothing more
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._thread is None or self._file is None:
            return
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self.path.stat().st_size:
            self.path.unlink()
            with contextlib.suppress(OSError):  # another process's file lies there
                self.path.parent.rmdir()

    def beat(self, step: int, what: str) -> None:
        """Says that the loop moved, which is after `step`, and is now about `what`."""
        self._last = step, what, time.monotonic()  # one assignment: no lock is needed

    def _watch(self) -> None:
        limit = self.watch.stall_s
        seen, seen_at = None, 0.0  # the beat that nothing followed, and when that was noticed
        self._arm()
        while not self._closing.wait(min(max(limit / 20, 0.05), 10.0)):
            self._arm()
            last, now = self._last, time.monotonic()
            if seen is not None and last is not seen:
                log.error("%s: it moves again, in %s", self._where(last), last[1])
                seen = None
            elif seen is not None and self.watch.stall_exit and now - seen_at > limit:
                self._leave(now - last[2], last)
            elif seen is None and now - last[2] > limit:
                seen, seen_at = last, now
                self._dump(now - last[2], last)

    def _arm(self) -> None:
        """Puts off the thread that needs no interpreter: it acts when this one cannot run."""
        assert self._file is not None
        limit, leaves = self.watch.stall_s, self.watch.stall_exit
        faulthandler.dump_traceback_later(
            2 * limit if leaves else limit, repeat=not leaves, file=self._file, exit=leaves
        )

    def _where(self, last: tuple[int, str, float]) -> str:
        return f"process {self.process}, after step {last[0]}"

    def _dump(self, waited: float, last: tuple[int, str, float]) -> None:
        assert self._file is not None
        what = f"{self._where(last)}: nothing has moved for {waited:.0f} s, in {last[1]}"
        lines = [time.strftime("%Y-%m-%d %H:%M:%S ") + what]
        lines += [f"thread 0x{t.ident or 0:016x} is {t.name}" for t in threading.enumerate()]
        self._file.write("\n".join(lines) + "\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        ends = f"; it ends in {self.watch.stall_s:.0f} s" if self.watch.stall_exit else ""
        log.error("%s. Where every thread stands: %s%s", what, self.path, ends)

    def _leave(self, waited: float, last: tuple[int, str, float]) -> None:
        faulthandler.dump_traceback_later(LAST_WORDS_S, file=self._file or sys.stderr, exit=True)
        error = Stalled(
            f"{self._where(last)}: nothing has moved for {waited:.0f} s, in {last[1]}; see "
            f"{self.path}. The same command goes on from the last checkpoint."
        )
        try:
            self._end(error, Exit.AGAIN)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(Exit.AGAIN)


class Health:
    """Measures, whenever metrics are written, what may go wrong slowly, and warns of it.

    Args:
      watch: the limits.
      clock: whose `input` seconds are what the devices lacked data.
      process: the number of this process, if there are others: their warnings pass through a log
        that shows errors alone.
      memory_gb: see `host_memory_gb`.
    """

    def __init__(
        self,
        watch: Watch,
        clock: Goodput,
        *,
        process: int | None = None,
        memory_gb: Callable[[], float] | None = None,
    ) -> None:
        self.watch, self.clock = watch, clock
        self._who = "" if process is None else f"process {process}: "
        self._level = logging.ERROR if process else logging.WARNING
        self._memory_gb = memory_gb or host_memory_gb
        self._growth = Growth(watch.growth_gb)
        self._last = (0.0, 0.0)
        self._window: tuple[int, float, float] | None = None
        self._warned = False

    def look(self, step: int) -> dict[str, float]:
        """`input_share` since the last look, `host_memory_gb` and `goodput`; `step` has ended.

        `input_share` is the time in which the devices had nothing to do as the next batch was not
        there (`Goodput`), over the time of training, without checkpoints and evaluations.
        """
        trained, lacked = self.clock.training()
        before, self._last = self._last, (lacked, trained)
        share = (lacked - before[0]) / max(trained - before[1], 1e-9)
        self._judge(step, lacked, trained)
        memory, now = self._memory_gb(), self.clock.now()
        if grown := self._growth.add(now, memory):
            gb, over_s = grown
            self._warn(
                f"the host's memory has grown by {gb:.1f} GB within {over_s / 60:.0f} minutes, to "
                f"{memory:.1f} GB at step {step}, and grows on: something keeps what it should let "
                "go, such as an evaluator or what reads the data. watch.growth_gb says how much is "
                "too much."
            )
        self.clock.save()
        return {"input_share": share, "host_memory_gb": memory, "goodput": self.clock.share()}

    def _judge(self, step: int, lacked: float, trained: float) -> None:
        """Warns once where the devices starved over a window; the first begins with this run."""
        if self._warned:
            return
        if self._window is None:
            self._window = step, lacked, trained
        begin, lacked_then, trained_then = self._window
        took = trained - trained_then
        if step - begin < WINDOW_STEPS or took < WINDOW_S:
            return
        self._window = step, lacked, trained
        share = (lacked - lacked_then) / took
        if share > self.watch.starved:
            self._warned = True
            self._warn(
                f"in steps {begin + 1} to {step} the devices lacked data for {share:.0%} of the "
                f"time ({(lacked - lacked_then) / (step - begin) * 1e3:.0f} ms a step): read it "
                "with more workers or from a faster disk. It is `input_share` in the metrics."
            )

    def _warn(self, text: str) -> None:
        log.log(self._level, "%s%s", self._who, text)


class Growth:
    """Tells steady growth of a noisy number from warming up, steps and peaks.

    It looks at minima over windows of equal length (of three minutes and five samples at least), so
    that peaks do not count; windows join in pairs when there are 16, so that slow growth is seen at
    the scale of the run. Growth is steady where the last seven or eight minima, without the first
    of all, which is warming up, rise by more than the limit: each time by a quarter of the mean
    rise or more, never by half of the whole, and by two fifths of it in the second half.

    Args:
      limit: the growth that is told; 0 tells of none.
      window_s: of the first windows.
    """

    def __init__(self, limit: float, *, window_s: float = 180.0) -> None:
        self.limit, self.window_s, self._first_s = limit, window_s, window_s
        self._minima: list[float] = []
        self._times: list[float] = []  # at which the windows ended
        self._window: tuple[float, float, int] | None = None  # beginning, minimum, samples

    def add(self, now: float, value: float) -> tuple[float, float] | None:
        """Takes a sample; returns (growth, seconds) where it is steady, and then begins anew."""
        began, least, samples = self._window or (now, value, 0)
        self._window = began, min(least, value), samples + 1
        if not self.limit or now - began < self.window_s or samples < 4:
            return None
        self._minima.append(self._window[1])
        self._times.append(now)
        self._window = None
        found = self._steady()
        if found:
            self._minima, self._times, self.window_s = [], [], self._first_s
        elif len(self._minima) == MAX_MINIMA:
            pairs = zip(self._minima[::2], self._minima[1::2], strict=True)
            self._minima, self._times = [min(pair) for pair in pairs], self._times[1::2]
            self.window_s *= 2
        return found

    def _steady(self) -> tuple[float, float] | None:
        minima = self._minima[1:][-LAST_MINIMA:]
        if len(minima) < LAST_MINIMA - 1:
            return None
        rises = [after - before for before, after in itertools.pairwise(minima)]
        grown, later = minima[-1] - minima[0], minima[-1] - minima[(len(minima) - 1) // 2]
        even = min(rises) > grown / (4 * len(rises)) and max(rises) <= grown / 2
        if grown <= self.limit or not even or later < 0.4 * grown:
            return None
        return grown, self._times[-1] - self._times[-len(minima)]


def host_memory_gb() -> float:
    """Memory (10^9 bytes) that this process and those it started hold in RAM.

    Without pages of files, mapped corpora among them, and of shared memory: the kernel takes the
    former back when it needs them. Where there is no /proc, the largest resident size so far.
    """
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        try:
            resident, shared = Path(STATM.format(pid=pid)).read_text().split()[1:3]
            total += page * (int(resident) - int(shared))
        except (OSError, ValueError):  # it has just ended, or there is no /proc
            continue
    if not total:
        unit = 1 if sys.platform == "darwin" else 1024
        total = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return total / 1e9


def _print(error: Exception, code: int) -> None:
    del code
    print(f"error: {error}", file=sys.stderr)
