"""Sources and results in S3, served by moto on this machine: the bytes are those of a local run."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmjax.data.folder import Folder
from lmjax.data.packed import Tokens
from lmjax.errors import UserError
from lmjax.prepare import lock
from lmjax.prepare.backends.inline import Inline
from lmjax.prepare.files import find
from lmjax.prepare.identity import identity
from lmjax.prepare.lock import LOCK, alone
from lmjax.prepare.pipeline import run
from lmjax.prepare.stages.decontaminate import Decontaminate
from tests.prepare import small

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bucket(monkeypatch):
    """A file system of fsspec with an empty bucket "crawl"."""
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="localhost", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lock, "PAUSE_S", 0.01)
    store = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    fsspec.filesystem("s3").clear_instance_cache()
    if store.exists("crawl"):  # moto's stores outlive its servers
        store.rm("crawl", recursive=True)
    store.mkdir("crawl")
    yield store
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def memory(monkeypatch):
    """The address of a folder in the memory of this process."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(lock, "PAUSE_S", 0.0)
    yield "memory://out"
    store = fsspec.filesystem("memory")
    if store.exists("/out"):
        store.rm("/out", recursive=True)


def tree(address: str) -> dict[str, str]:
    """As small.tree, of a folder anywhere."""
    folder = Folder(address)
    return {
        name: hashlib.sha256(folder.read(name)).hexdigest()
        for name in sorted(folder.files())
        if Path(name).name not in ("timing.json", ".lock")
    }


class Refuses:
    """An engine that runs nothing that is not done."""

    def map(self, tasks):
        done = [task.run() for task in tasks]
        assert not any(each.seconds for each in done), [type(t).__name__ for t in tasks]
        return done


class Killed(BaseException):
    """Ends the process, as far as anything that catches errors can see."""


def test_results_elsewhere_are_those_on_a_disk(tmp_path, memory, monkeypatch):
    """And a run that dies before any of its writes goes on."""
    inputs = str(small.write_input(tmp_path / "in"))
    prepare = small.prepare(inputs, shard_bytes=4000)
    manifest = run(prepare, str(tmp_path / "local"), engine=Inline())
    left, deaths, rng = [0], 0, random.Random(0)

    def dies(real):
        def write(self, *args):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(self, *args)

        return write

    with monkeypatch.context() as patch:
        for name in ("write", "create", "copy"):
            patch.setattr(Folder, name, dies(getattr(Folder, name)))
        for _ in range(100):
            left[0] = rng.randint(2, 25)
            try:
                run(prepare, memory, engine=Inline())
            except Killed:
                deaths += 1
                continue
            break
    assert deaths > 5
    assert tree(memory) == small.tree(tmp_path / "local")
    assert run(prepare, memory, engine=Refuses()) == manifest


def test_two_runs_in_one_folder_elsewhere(memory, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    monkeypatch.setattr(lock, "SILENT_S", 0.5)
    out = Folder(memory)
    with alone(out):
        with pytest.raises(UserError, match="another run is at work in memory://out"), alone(out):
            pass
        with alone(Folder("memory://out/other")):
            pass
    with alone(out):
        pass
    assert out.size(LOCK) is None
    for held, seconds in [
        (b'{"run": "x", "host": "elsewhere", "pid": 1, "beat": 3}', 0.5),  # waits: it may live
        (b"", 0.5),
        (b'{"run": "x", "host": "%s", "pid": %d}' % (os.uname().nodename.encode(), _dead()), 0.0),
    ]:
        out.write(LOCK, held)
        begin = time.monotonic()
        with alone(out):
            assert seconds <= time.monotonic() - begin < seconds + 5
    real = lock._held

    def another(folder):
        found = real(folder)
        return found and {**found, "run": "another's, that came a moment later"}

    monkeypatch.setattr(lock, "_held", another)
    with pytest.raises(UserError, match="another run"), alone(out):
        pass


def _dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.slow
def test_records_are_those_of_local_files(tmp_path, bucket):
    inputs = small.write_input(tmp_path / "in")
    bucket.put(str(inputs), "crawl/deep/", recursive=True)
    (path,) = {name.rpartition("/")[0] for name in bucket.find("crawl")}
    local = run(small.prepare(str(inputs)), str(tmp_path / "local"), engine=Inline())
    out = tmp_path / "remote"
    remote = run(small.prepare(f"s3://{path}"), str(out), engine=Inline())
    counts = [[{**row, "folder": ""} for row in told["stages"]] for told in (local, remote)]
    assert counts[0] == counts[1]
    assert small.tree(out / "tokens") == small.tree(tmp_path / "local" / "tokens")
    before = small.tree(out)
    assert run(small.prepare(f"s3://{path}"), str(out), engine=Refuses()) == remote
    assert small.tree(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("runner, needs, kills", [("inline", "s3fs", 6), ("native", "daft", 3)])
def test_kill_9(tmp_path, bucket, runner, needs, kills):
    """Results in S3, of commands that are killed and begin anew; then the trainer reads them."""
    pytest.importorskip(needs)
    inputs = small.write_input(tmp_path / "in")
    run(small.prepare(str(inputs)), str(tmp_path / "local"), engine=Inline())
    out, expected = "s3://crawl/out", small.tree(tmp_path / "local")
    command = [sys.executable, "-m", "tests.prepare.small", out, runner, str(inputs)]
    rng, killed, before = random.Random(0), 0, -1
    while killed < kills:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        more = rng.randint(1, 2 * len(expected) // (kills + 1))
        while process.poll() is None and len(Folder(out).files()) < before + more:
            time.sleep(0.01)
        before = len(Folder(out).files())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed > kills // 2
    subprocess.run(command, cwd=ROOT, check=True)
    assert tree(out) == expected
    there, local = (Tokens(path=path, length=16) for path in (out, str(tmp_path / "local")))
    assert there.fingerprint == local.fingerprint and list(there.store.verify()) == []
    rows = [data._examples(2).rows(range(20))["tokens"].tolist() for data in (there, local)]
    assert rows[0] == rows[1]
    done = subprocess.run(
        [sys.executable, "-m", "lmjax.data", f"--path={out}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "are as they were written" in done.stdout, done.stderr
    name = next(name for name in bucket.find("crawl/out/tokens") if name.endswith(".idx"))
    bucket.pipe(name, b"\0" * 80)
    os.environ["LMJAX_CACHE"], cache = str(tmp_path / "cache"), os.environ.get("LMJAX_CACHE", "")
    try:
        (damage,) = Tokens(path=out, length=16).store.verify()
    finally:
        os.environ["LMJAX_CACHE"] = cache
    assert "is damaged" in damage and name in damage


@pytest.mark.slow
def test_files_that_a_stage_reads(tmp_path, bucket):
    """An evaluation set in S3 counts by its bytes."""
    item = '{"question": "which nine words stand here in a row my friend"}\n'
    (tmp_path / "set.jsonl").write_text(item)
    bucket.pipe("crawl/sets/set.jsonl", item.encode())
    stage = Decontaminate(paths=["s3://crawl/sets"])
    before = identity(stage)
    assert stage.files() == ["s3://crawl/sets/set.jsonl"]
    bucket.pipe("crawl/sets/set.jsonl", item.upper().encode())
    assert identity(stage) != before
    bucket.rm("crawl/sets/set.jsonl")
    with pytest.raises(UserError, match=r"s3://crawl/sets.* holds no files"):
        identity(stage)


@pytest.mark.slow
def test_find_in_a_store(bucket):
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".x"):
        bucket.pipe(f"crawl/{name}", name.encode())
    assert [file.name for file in find("s3://crawl")] == ["a.txt", "b/1.txt", "b/2.txt"]
    assert [file.name for file in find("s3://crawl/**/*.txt")] == ["a.txt", "b/1.txt", "b/2.txt"]
    assert [file.name for file in find("s3://crawl/b/")] == ["1.txt", "2.txt"]
    (one,) = find("s3://crawl/b/1.txt")
    assert (one.name, one.size) == ("1.txt", 7)
    with one.open() as file:
        file.seek(2)
        assert file.read() == b"1.txt"
    one.check()
    bucket.pipe("crawl/b/1.txt", b"another")
    assert one.version and find("s3://crawl/b/1.txt")[0].version != one.version
    with pytest.raises(UserError, match="changed while it was read"):
        one.check()
    with pytest.raises(UserError, match="holds no files"):
        find("s3://crawl/nothing")
    with pytest.raises(UserError, match="cannot be opened"):
        find("nonsense://crawl")
    with pytest.raises(OSError, match=r"s3://nowhere/x/y cannot be written: .*NoSuchBucket|exist"):
        Folder("s3://nowhere/x").write("y", b"z")
