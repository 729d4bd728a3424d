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


def serve(ready: Mapping[str, Any], run: Callable[[int], None]) -> None:
    """Answers with `ready` once, then times `run(N)` for each line of input.

    One step goes untimed before: a process that slept has its memory to fetch again.
    """
    _say(ready)
    for line in sys.stdin:
        turn = time.process_time()
        run(1)
        wall, cpu = time.perf_counter(), time.process_time()
        run(int(line.split()[1]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _say(
            {
                "wall_s": time.perf_counter() - wall,
                "cpu_s": time.process_time() - cpu,
                "turn_cpu_s": time.process_time() - turn,
                "peak_bytes": peak,
            }
        )


def _say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)
