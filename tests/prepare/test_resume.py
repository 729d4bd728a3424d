"""Killed at any moment, a preparation goes on to the same bytes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmjax.data.folder import Folder
from lmjax.errors import UserError
from lmjax.prepare.backends.inline import Inline
from lmjax.prepare.pipeline import run
from lmjax.prepare.read.sheet import Piece, Sheet
from lmjax.prepare.read.source import Source
from lmjax.prepare.read.text import Lines
from tests.prepare import small

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Ends the process, as far as anything that catches errors can see."""


def test_every_write_can_be_the_last(tmp_path, monkeypatch):
    """The run dies before its n-th write and again before and after later ones."""
    inputs = small.write_input(tmp_path / "in")
    prepare = small.prepare(str(inputs), shard_bytes=4000)
    run(prepare, str(tmp_path / "whole"), engine=Inline())
    left = [0]

    def rename(self, target, real=Path.rename):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    deaths, rng = 0, random.Random(0)
    for _ in range(200):
        left[0] = rng.randint(1, 20)
        try:
            run(prepare, str(tmp_path / "killed"), engine=Inline())
        except Killed:
            deaths += 1
            continue
        break
    assert deaths > 5
    assert small.tree(tmp_path / "killed") == small.tree(tmp_path / "whole")


def command(out: Path, runner: str, inputs: Path) -> list[str]:
    return [sys.executable, "-m", "tests.prepare.small", str(out), runner, str(inputs)]


def files_in(out: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(out))


def run_killed(out: Path, runner: str, inputs: Path, *, files: int) -> bool:
    """Kills the command once it has written so many files; returns whether it was running still."""
    process = subprocess.Popen(
        command(out, runner, inputs), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        if files_in(out) >= files:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.003)
    return False


def check_kills(tmp_path: Path, runner: str, moments: int) -> None:
    """Kills runs at moments all over the work, each of which goes on from the one before."""
    inputs, out = small.write_input(tmp_path / "in"), tmp_path / "killed"
    subprocess.run(command(tmp_path / "whole", runner, inputs), cwd=ROOT, check=True)
    rng, killed, most = random.Random(os.getpid()), 0, files_in(tmp_path / "whole")
    for _ in range(3 * moments):
        if killed == moments:
            break
        before = files_in(out)
        step = max(2, 2 * (most - before) // (moments - killed + 1))
        if run_killed(out, runner, inputs, files=before + rng.randint(1, step)):
            killed += 1
        else:  # it was through before it could be killed
            shutil.rmtree(out)
    assert killed == moments
    subprocess.run(command(out, runner, inputs), cwd=ROOT, check=True)
    assert small.tree(out) == small.tree(tmp_path / "whole")


def test_kill_9(tmp_path):
    check_kills(tmp_path, "inline", 3)


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["inline", "native"])
def test_kill_9_at_twenty_moments(tmp_path, runner):
    if runner == "native":
        pytest.importorskip("daft")
    check_kills(tmp_path, runner, 20)


@pytest.mark.slow
def test_another_engine_goes_on(tmp_path):
    """Killed under one engine and number of workers, ended under others; a file changes between."""
    pytest.importorskip("daft")
    inputs, out = small.write_input(tmp_path / "in"), tmp_path / "killed"
    files = 0
    for runner, workers in [("native", "3"), ("inline", "1"), ("native", "1"), ("native", "2")]:
        process = subprocess.Popen([*command(out, runner, inputs), workers], cwd=ROOT)
        while process.poll() is None and files_in(out) < files + 40:
            time.sleep(0.003)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        files = files_in(out)
    changed = (inputs / "b.txt").read_text().replace("The", "And", 3)
    (inputs / "b.txt").write_text(changed + "One more line\n")
    subprocess.run(command(out, "inline", inputs), cwd=ROOT, check=True)
    subprocess.run(command(tmp_path / "whole", "native", inputs), cwd=ROOT, check=True)
    assert small.tree(out) == small.tree(tmp_path / "whole")


def test_a_full_disk_ends_the_run_and_no_record(tmp_path, monkeypatch):
    """Whatever write finds no room: the error names it, and the same command goes on."""
    inputs = small.write_input(tmp_path / "in")
    prepare = small.prepare(str(inputs), shard_bytes=6000)
    run(prepare, str(tmp_path / "whole"), engine=Inline())
    out, left = tmp_path / "full", [0]

    def fsync(file, real=os.fsync):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    failures, rng = 0, random.Random(0)
    for _ in range(100):
        left[0] = rng.randint(1, 25)
        try:
            run(prepare, str(out), engine=Inline())
        except (OSError, UserError) as error:
            assert "No space left" in str(error) and str(out) in str(error)
            failures += 1
            continue
        break
    assert failures > 5
    assert small.tree(out) == small.tree(tmp_path / "whole")


@dataclass(frozen=True, kw_only=True)
class Growing:
    """Lines of files, one of which another program writes on meanwhile."""

    name: str

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        yield from Lines().read(piece, sheet)
        if piece.file.name == self.name:
            with open(piece.file.path, "a") as file:
                file.write("another line\n")


def test_a_file_that_changes_while_it_is_read(tmp_path):
    inputs = small.write_input(tmp_path / "in")
    source = Source(path=str(inputs), format=Growing(name="b.txt"))
    prepare = small.prepare(str(inputs), sources={"x": source}, stages={}, tokens=None)
    with pytest.raises(UserError, match=r"b\.txt changed while it was read: run the same"):
        run(prepare, str(tmp_path / "out"), engine=Inline())


def test_what_is_half_written_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), Folder(str(tmp_path)).create("x") as file:
        file.write(b"x")
        file.write(1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_what_no_outcome_tells_of_is_removed(tmp_path):
    """Parts of a shard that had more of them, and of shards whose run was killed."""
    inputs = small.write_input(tmp_path / "in")
    prepare = small.prepare(str(inputs), tokens=None, shard_bytes=2000)
    run(prepare, str(tmp_path / "out"), engine=Inline())
    whole = small.tree(tmp_path / "out")
    (folder,) = (tmp_path / "out" / "stages").glob("*-read-*")
    for name in ("part-00000-001.parquet", "part-77777.parquet", "quarantined-77777.parquet"):
        shutil.copy(folder / "part-00000.parquet", folder / name)
    run(prepare, str(tmp_path / "out"), engine=Inline())
    assert small.tree(tmp_path / "out") == whole


def test_a_damaged_outcome_is_made_again(tmp_path):
    inputs = small.write_input(tmp_path / "in")
    prepare = small.prepare(str(inputs), tokens=None, shard_bytes=2000)
    run(prepare, str(tmp_path / "out"), engine=Inline())
    whole = small.tree(tmp_path / "out")
    stages = tmp_path / "out" / "stages"
    for pattern, how in [
        ("*-same-*/counts-00001.json", lambda file: file.write_text("{")),
        ("*-lower-*/part-00000.parquet", lambda file: file.unlink()),
        ("*-split-*/part-00002.parquet", lambda file: file.write_bytes(b"PAR1")),
    ]:
        (file,) = stages.glob(pattern)
        how(file)
    run(prepare, str(tmp_path / "out"), engine=Inline())
    assert small.tree(tmp_path / "out") == whole
