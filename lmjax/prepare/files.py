"""Files that are read: on this machine, or in an object store (`s3://`, `gs://`, `hf://`)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lmjax.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a source, known without being opened.

    Attributes:
      path: where it is, a path or an address.
      name: its path below what the source names, by which its records are called.
      size: bytes.
      version: what changes when the file does: its time of change, or the store's tag.
    """

    path: str
    name: str
    size: int
    version: str

    def open(self) -> BinaryIO:
        """Opens it for reading, at its first byte."""
        if not is_remote(self.path):
            return open(self.path, "rb")
        store, _ = _store(self.path)
        file: BinaryIO = store.open(self.path, "rb", block_size=1 << 24)
        return file


def is_remote(path: str) -> bool:
    """Whether a path is an address of an object store."""
    return "://" in path


def find(path: str) -> list[File]:
    """The files that a path, a folder or a glob names, sorted by name; hidden ones are left out.

    Raises UserError where there is none, or a store has no driver here.
    """
    if not path.strip():
        raise UserError("path is empty: name a file, a folder or a glob.")
    files = sorted(
        _find_remote(path) if is_remote(path) else _find_local(path), key=lambda file: file.name
    )
    if not files:
        raise UserError(f"{path!r} holds no files: give a file, a folder of files or a glob.")
    return files


def _find_local(path: str) -> Iterator[File]:
    given = Path(path).expanduser()
    if glob.has_magic(path) and not given.exists():
        root = Path(_stem(str(given)))
        found = [Path(name) for name in glob.glob(str(given), recursive=True)]
    elif given.is_dir():
        root, found = given, list(given.rglob("*"))
    elif given.exists():
        root, found = given.parent, [given]
    else:
        near = [f.as_posix() for f in given.parent.iterdir()] if given.parent.is_dir() else []
        raise UserError(f"there is nothing at {path!r}." + did_you_mean(given.as_posix(), near))
    for file in found:
        name = file.relative_to(root).as_posix()
        if file.is_file() and (file == given or not _hidden(name)):
            told = file.stat()
            yield File(path=str(file), name=name, size=told.st_size, version=str(told.st_mtime_ns))


def _find_remote(path: str) -> Iterator[File]:
    store, inside = _store(path)
    scheme = path.partition("://")[0]
    store.invalidate_cache()  # of listings: what changed since is another version
    try:
        if glob.has_magic(inside):
            root, told = _stem(inside), store.glob(inside, detail=True)
        elif store.isfile(inside):
            root, told = os.path.dirname(inside), {inside: store.info(inside)}
        else:
            root, told = inside, store.find(inside, detail=True)
    except Exception as error:  # of botocore, gcsfs, aiohttp, ...: their text says what it was
        raise UserError(
            f"{path} cannot be listed: {error}. Check the address and rights."
        ) from error
    for full, info in told.items():
        name = os.path.relpath(full, root) if root else full
        if info.get("type") != "directory" and not _hidden(name):
            version = next((str(info[k]) for k in ("ETag", "etag", "mtime") if info.get(k)), "")
            size = int(info.get("size") or 0)
            yield File(path=f"{scheme}://{full}", name=name, size=size, version=version)


def _store(path: str) -> tuple[Any, str]:
    """The file system of an address, and the path inside it."""
    try:
        import fsspec

        store, inside = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{path} cannot be opened: {error}. Addresses need `pip install fsspec` and a driver: "
            "s3fs, gcsfs or huggingface_hub."
        ) from error
    return store, str(inside).rstrip("/")


def _stem(pattern: str) -> str:
    """The folders of a glob before its first magic."""
    parts = pattern.split("/")
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else ".")


def _hidden(name: str) -> bool:
    return f"/{name}".find("/.") >= 0
