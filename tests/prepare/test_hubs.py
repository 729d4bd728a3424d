"""Folders of Hugging Face and of Google, spoken to by their own drivers, on this machine.

The servers know what a listing and a reading need, as the drivers ask for it, and nothing else.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from lmjax.data.folder import Folder
from lmjax.errors import UserError
from lmjax.prepare.backends.inline import Inline
from lmjax.prepare.files import find
from lmjax.prepare.pipeline import run
from tests.prepare import small

pytestmark = pytest.mark.slow
ETAG = '"0123"'


class Hub(BaseHTTPRequestHandler):
    """The calls of both; `files` maps names below `owner/corpus`, or the bucket, to bytes."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - of each server's own subclass
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, data: bytes | object, code: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def file(self, name: str) -> None:
        data = self.files[name]
        told = {"ETag": ETAG, "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1)
            told["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            self.reply(data[begin : end + 1], 206, **told)
        else:
            self.reply(data, **told)


class HuggingFace(Hub):
    def entry(self, name: str) -> dict:
        if name in self.files:
            size = len(self.files[name])
            return {"type": "file", "path": name, "size": size, "oid": f"oid of {name}"}
        return {"type": "directory", "path": name, "oid": "0"}

    def do_GET(self) -> None:
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        _, _, inside = path.partition("/owner/corpus")
        if inside.startswith("/resolve/"):
            self.file(inside.split("/", 3)[3])
        elif inside.startswith("/tree/"):
            root = [*inside.split("/", 3), ""][3]
            names = {name for name in self.files if name.startswith(f"{root}/" if root else "")}
            if query.get("recursive", ["False"])[0].lower() != "true":
                depth = root.count("/") + 1 if root else 0
                names = {"/".join(name.split("/")[: depth + 1]) for name in names}
            self.reply([self.entry(name) for name in sorted(names)])
        elif path.startswith("/api/datasets/owner/corpus"):
            self.reply({"id": "owner/corpus", "sha": "0" * 40, "siblings": []})
        else:
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = json.loads(self.body() or b"{}").get("paths", [])
        folders = {name.rpartition("/")[0] for name in self.files}
        self.reply([self.entry(name) for name in asked if name in self.files or name in folders])


class Google(Hub):
    def entry(self, name: str) -> dict:
        size, md5 = str(len(self.files[name])), str(hash(self.files[name]))
        told = {"kind": "storage#object", "bucket": "bucket", "name": name, "generation": "1"}
        return {**told, "id": name, "size": size, "md5Hash": md5, "etag": md5}

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        name = path.partition("/b/bucket/o/")[2]
        if name in self.files:
            if query.get("alt") == ["media"] or path.startswith("/download"):
                self.file(name)
            else:
                self.reply(self.entry(name))
        elif path.rstrip("/").endswith("/b/bucket/o"):
            prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
            names = [name for name in sorted(self.files) if name.startswith(prefix)]
            deeper = {
                prefix + name[len(prefix) :].split(delimiter)[0] + delimiter
                for name in names
                if delimiter and delimiter in name[len(prefix) :]
            }
            items = [n for n in names if not any(n.startswith(folder) for folder in deeper)]
            told = {"kind": "storage#objects", "prefixes": sorted(deeper)}
            self.reply({**told, "items": [self.entry(name) for name in items]})
        else:
            self.reply({"error": {"code": 404, "message": "Not Found"}}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        _, told, data = self.body().split(b"\n\n", 2)  # a multipart message, as gcsfs writes it
        name = json.loads(told.split(b"\n--")[0])["name"]
        self.files[name] = data.rpartition(b"\n--")[0]
        self.reply(self.entry(name))

    def do_DELETE(self) -> None:
        self.body()
        del self.files[unquote(urlsplit(self.path).path).partition("/b/bucket/o/")[2]]
        self.reply(b"", 204)


def served(kind: type[Hub], files: dict[str, bytes]) -> tuple[ThreadingHTTPServer, str]:
    handler = type("Handler", (kind,), {"files": files})
    server = ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://localhost:{server.server_address[1]}"


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> dict[str, bytes]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    folder = small.write_input(tmp_path / "in")
    return {f"data/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def huggingface(inputs, monkeypatch) -> Iterator[str]:
    hub = pytest.importorskip("huggingface_hub")
    server, address = served(HuggingFace, inputs)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)  # as HF_ENDPOINT would, before an import
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.HfFileSystem.clear_instance_cache()
    yield "hf://datasets/owner/corpus/data"
    hub.HfFileSystem.clear_instance_cache()
    server.shutdown()


@pytest.fixture
def google(inputs, monkeypatch) -> Iterator[str]:
    gcsfs = pytest.importorskip("gcsfs")
    server, address = served(Google, inputs)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield "gs://bucket/data"
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.shutdown()


@pytest.mark.parametrize("kind", ["huggingface", "google"])
def test_a_source_there_gives_the_records_of_local_files(kind, request, tmp_path):
    path = request.getfixturevalue(kind)
    files = {file.name: file for file in find(path)}
    assert sorted(files) == ["a.txt", "b.txt", "c.txt", "d.jsonl"]
    assert all(file.version and file.path.startswith(path) for file in files.values())
    assert [file.name for file in find(f"{path}/*.txt")] == ["a.txt", "b.txt", "c.txt"]
    with files["a.txt"].open() as file:
        file.seek(3)
        assert file.read() == (tmp_path / "in" / "a.txt").read_bytes()[3:]
    files["a.txt"].check()
    there = run(small.prepare(path), str(tmp_path / "there"), engine=Inline())
    run(small.prepare(str(tmp_path / "in")), str(tmp_path / "here"), engine=Inline())
    assert small.tree(tmp_path / "there" / "tokens") == small.tree(tmp_path / "here" / "tokens")
    assert there["sources"]["lines"]["path"] == f"{path}/*.txt"
    with pytest.raises(UserError, match=r"holds no files|cannot be listed"):
        find(f"{path}/nothing")


def test_a_folder_of_google(google):
    folder = Folder("gs://bucket/out")
    folder.write("a/b.txt", b"some bytes")
    assert folder.read("a/b.txt") == b"some bytes" and folder.size("a/b.txt") == 10
    assert folder.read_ranges([("a/b.txt", 5, 10)]) == [b"bytes"]
    assert folder.names() == ["a"] and (folder / "a").names("*.txt") == ["b.txt"]
    assert folder.files() == {"a/b.txt": 10} and folder.size("c") is None
    with pytest.raises(FileNotFoundError):
        folder.read("c")
    folder.remove(["a/b.txt"])
    assert folder.files() == {}
