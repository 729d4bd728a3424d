"""What both sides of a benchmark share: a process that runs steps when told to, and times them.

Reads `run N` lines from its input; answers each with one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


class Turn:
    """The times of one turn, of which the first step is not timed."""

    def __init__(self) -> None:
        self.cpu = time.process_time()

    def begin(self) -> None:
        """The untimed step has ended."""
        self.began = time.perf_counter(), time.process_time()

    def end(self) -> dict[str, float]:
        """What to say of the turn."""
        cpu = time.process_time()
        return {
            "wall_s": time.perf_counter() - self.began[0],
            "cpu_s": cpu - self.began[1],
            "turn_cpu_s": cpu - self.cpu,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def serve(ready: Mapping[str, Any], run: Callable[[int], None]) -> None:
    """Answers with `ready` once, then times `run(N)` for each line of input.

    One step goes untimed before: a process that slept has its memory to fetch again.
    """
    say(ready)
    for line in sys.stdin:
        turn = Turn()
        run(1)
        turn.begin()
        run(int(line.split()[1]))
        say(turn.end())


def say(answer: Mapping[str, Any]) -> None:
    """One line of JSON to whoever asked."""
    print(json.dumps(answer), flush=True)
