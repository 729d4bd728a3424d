"""One preparation on every engine: the same bytes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmjax.errors import UserError
from lmjax.prepare.backends import pack, run_packed, unpacked
from lmjax.prepare.backends.inline import Inline
from lmjax.prepare.pipeline import run
from lmjax.prepare.tasks import Done
from tests.prepare import small

ROOT = Path(__file__).parents[2]


@dataclass
class Says:
    """A task that brings back a number, or fails in some way."""

    number: int
    error: type[Exception] | None = None

    def run(self) -> Done:
        if self.error:
            raise self.error(f"number {self.number}")
        return Done(seconds={"x": (self.number, 0.0)})


def packed(*tasks):
    return [run_packed(pack(task)) for task in tasks]


def test_tasks_travel_and_their_errors_come_back():
    pytest.importorskip("cloudpickle")
    assert [d.seconds["x"][0] for d in unpacked(packed(Says(1), Says(2)))] == [1, 2]
    with pytest.raises(UserError, match="number 2"):
        unpacked(packed(Says(1), Says(2, UserError), Says(3, ValueError)))
    with pytest.raises(OSError, match=r"^number 2$"):
        unpacked(packed(Says(1), Says(2, OSError)))
    with pytest.raises(RuntimeError, match=r"(?s)Says failed:.*ValueError: number 3"):
        unpacked(packed(Says(3, ValueError)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "runner, needs", [("native", "daft"), ("ray", "ray"), ("beam", "apache_beam")]
)
def test_engines_give_the_same_bytes(tmp_path, runner, needs):
    pytest.importorskip(needs)
    inputs = small.write_input(tmp_path / "in")
    run(small.prepare(str(inputs)), str(tmp_path / "inline"), engine=Inline())
    out = tmp_path / runner
    command = [sys.executable, "-m", "tests.prepare.small", str(out), runner, str(inputs)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert small.tree(out) == small.tree(tmp_path / "inline")
