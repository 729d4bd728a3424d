"""What both sides of a benchmark share: a process that runs steps when told to, and times them.

Reads `run N` lines from its input; answers each with one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple


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


class Generation(NamedTuple):
    """When each token came, and the tokens of each row."""

    times: Sequence[float]
    tokens: Sequence[Sequence[int]]


def prompts(rows: int, length: int) -> list[list[int]]:
    """Random tokens, the same on all sides."""
    random = Random(length)
    return [[random.randrange(256) for _ in range(length)] for _ in range(rows)]


def serve_generation(
    ready: Mapping[str, Any],
    run: Callable[[int, int, int], Generation],
    also: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Answers with `ready` once, then times `run` for each line `run ROWS LENGTH TOKENS`.

    Decoding is what lies between the first token and the last. Three tokens go untimed before: they
    compile, and a process that slept has its memory to fetch again.
    """
    say(ready)
    for line in sys.stdin:
        rows, length, num_tokens = map(int, line.split()[1:])
        turn = Turn()
        run(rows, length, 3)
        turn.begin()
        began = time.perf_counter()
        made = run(rows, length, num_tokens)
        said = {"whole_s": time.perf_counter() - began}
        steps_s = [b - a for a, b in pairwise(made.times)]
        said |= {"decode_s": sum(steps_s), "steps_s": steps_s, "tokens": made.tokens}
        say({**turn.end(), **said, **also()})
