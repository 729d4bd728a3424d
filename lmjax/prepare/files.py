"""Files that are read: on this machine, or in an object store (`s3://`, `gs://`, `hf://`)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lmjax.data.folder import is_remote, store_of, told
from lmjax.errors import UserError, did_you_mean

# A hash of the contents, as S3, Google, Hugging Face name it; or else the time of a change.
_VERSIONS = ("ETag", "etag", "md5Hash", "lfs", "blob_id", "mtime", "LastModified", "created")


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
        with told(self.path, "read"):
            store, inside = store_of(self.path)
            file: BinaryIO = store.open(inside, "rb", block_size=1 << 24)
        return file

    def check(self) -> None:
        """Raises UserError where the file is another one by now: it changed since it was found."""
        if is_remote(self.path):
            with told(self.path, "read"):
                store, inside = store_of(self.path)
                info = store.info(inside)
            now = int(info.get("size") or 0), _version(info)
        else:
            stat = os.stat(self.path)
            now = stat.st_size, str(stat.st_mtime_ns)
        if now != (self.size, self.version):
            raise UserError(f"{self.path} changed while it was read: run the same command again.")


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
    store, inside = store_of(path)
    scheme = path.partition("://")[0]
    try:
        with told(path, "listed"):
            if glob.has_magic(inside):
                root, found = _stem(inside), store.glob(inside, detail=True)
            elif store.isfile(inside):
                root, found = os.path.dirname(inside), {inside: store.info(inside)}
            else:
                root, found = inside, store.find(inside, detail=True)
    except OSError as error:
        raise UserError(str(error)) from error
    for full, info in found.items():
        name = os.path.relpath(full, root) if root else full
        if info.get("type") != "directory" and not _hidden(name):
            size = int(info.get("size") or 0)
            address = f"{scheme}://{full.lstrip('/')}"
            yield File(path=address, name=name, size=size, version=_version(info))


def _version(info: Mapping[str, Any]) -> str:
    """What a store says of a file that changes when its bytes do."""
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _stem(pattern: str) -> str:
    """The folders of a glob before its first magic."""
    parts = pattern.split("/")
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else ".")


def _hidden(name: str) -> bool:
    return f"/{name}".find("/.") >= 0
