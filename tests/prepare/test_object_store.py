"""Sources in S3, served by moto on this machine."""

from __future__ import annotations

import pytest

from lmjax.errors import UserError
from lmjax.prepare.backends.inline import Inline
from lmjax.prepare.files import find
from lmjax.prepare.pipeline import run
from tests.prepare import small

pytestmark = pytest.mark.slow


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
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    fsspec.filesystem("s3").clear_instance_cache()
    if store.exists("crawl"):  # moto's stores outlive its servers
        store.rm("crawl", recursive=True)
    store.mkdir("crawl")
    yield store
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


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
    assert run(small.prepare(f"s3://{path}"), str(out), engine=Inline()) == remote
    assert small.tree(out) == before


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
    version = one.version
    bucket.pipe("crawl/b/1.txt", b"another")
    assert version and find("s3://crawl/b/1.txt")[0].version != version
    with pytest.raises(UserError, match="holds no files"):
        find("s3://crawl/nothing")
    with pytest.raises(UserError, match="cannot be opened"):
        find("nonsense://crawl")
