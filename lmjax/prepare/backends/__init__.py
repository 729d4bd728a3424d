"""Engines that run tasks: each has one verb, `map`, and all give the same files.

What is reduced by key goes through files (lmjax/prepare/exchange.py), so that an engine need not
know of keys. `inline` is this process; `native` is Daft on all cores of this machine; `ray` is the
same Daft plan on a cluster, whose machines must see the workdir; `beam` is any runner of Beam.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.tasks import Done, Task

RUNNERS = ("native", "ray", "inline", "beam")


class Backend(Protocol):
    """An engine."""

    def map(self, tasks: Sequence[Task]) -> list[Done]:
        """Runs all tasks, in any order and place; returns what they brought back, in theirs."""


@dataclass(frozen=True)
class Failed:
    """What a task raised: told by its task, where engines would wrap or retry it."""

    task: str
    error: str
    kind: str = ""

    def throw(self) -> None:
        """Raises it here."""
        if self.kind == "user":
            raise UserError(self.error)
        if self.kind == "machine":
            raise OSError(self.error)
        raise RuntimeError(f"{self.task} failed:\n{self.error}")


def backend(runner: str, *, workdir: str, workers: int = 0, address: str = "") -> Backend:
    """The engine of that name.

    Args:
      runner: one of `RUNNERS`.
      workdir: where the run lies.
      workers: how many tasks run at once; 0 for as many as there are cores.
      address: of a Ray cluster; "" starts one on this machine.
    """
    if runner == "inline":
        from lmjax.prepare.backends.inline import Inline

        return Inline()
    if runner in ("native", "ray"):
        from lmjax.prepare.backends.daft import Daft

        return Daft(workers=workers, ray=runner == "ray", address=address)
    if runner == "beam":
        from lmjax.prepare.backends.beam import Beam

        return Beam(workdir)
    raise UserError(f"there is no runner {runner!r}." + did_you_mean(runner, RUNNERS))


def pack(task: Task) -> bytes:
    """A task as bytes; its stages may be of a script or a notebook, which workers cannot import."""
    import cloudpickle

    packed: bytes = cloudpickle.dumps(task)
    return packed


def run_packed(packed: bytes) -> bytes:
    """Runs a task that `pack` gave; returns what it brings back, or what it raised, pickled."""
    task: Task = pickle.loads(packed)
    try:
        found: Done | Failed = task.run()
    except UserError as error:
        found = Failed(type(task).__name__, str(error), "user")
    except OSError as error:  # a full disk, a store that does not answer
        found = Failed(type(task).__name__, str(error), "machine")
    except Exception:  # whatever a stage of the user's raises
        found = Failed(type(task).__name__, traceback.format_exc())
    return pickle.dumps(found)


def unpacked(results: Sequence[bytes]) -> list[Done]:
    """What `run_packed` gave, in order; raises what the first task that failed raised."""
    found: list[Done] = []
    for result in results:
        held = pickle.loads(result)
        if isinstance(held, Failed):
            held.throw()
        found.append(held)
    return found
