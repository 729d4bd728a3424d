"""Files of a folder that is local or in an object store, whose whole files are cached on disk.

An object store answers a request in tens of milliseconds, so that nothing is read from it in parts:
a file comes whole, is checked against its sha256 and kept under it in $LMJAX_CACHE/shards, for all
processes and all stores that hold the same bytes. What was used longest ago goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data.cache import cache_folder, write_atomically
from lmjax.data.folder import Folder, is_remote, join, store_of
from lmjax.errors import UserError

log = logging.getLogger("lmjax")

_CHUNK = 1 << 24
_ABANDONED_S = 24 * 3600  # after which a file that is being written belongs to nobody
MAX_MAPPED = 512  # files that a process holds open, of the 1,024 that systems often allow

Part = tuple[str, int, str]  # name, bytes, sha256


def read_remote(url: str, *, missing: bool = False) -> bytes | None:
    """The bytes at an address; None, where `missing` is allowed, if nothing is there."""
    try:
        with _open(url) as file:
            data: bytes = file.read()
            return data
    except FileNotFoundError as error:
        if missing:
            return None
        raise UserError(f"there is no {url}: give the address of a store.") from error
    except UserError:
        raise
    except Exception as error:  # of botocore, gcsfs, aiohttp, ...
        raise UserError(f"{url} cannot be read: {error}. Check the address and rights.") from error


def localised(path: str, suffixes: Sequence[str]) -> str:
    """A path as it is; of an address the path of a copy in the cache.

    Copied is the file, or the folder, with the files right beside it that have these suffixes: they
    are small and belong together, as those of a published tokenizer do. Asked anew each time: what
    changed there is another copy.
    """
    if not is_remote(path):
        return path
    root, name = path.rstrip("/"), ""
    try:
        if Folder(root.rpartition("/")[0]).size(root.rpartition("/")[2]) is not None:
            root, _, name = root.rpartition("/")
        there = Folder(root)
        names = [n for n in there.names() if n == name or n.endswith(tuple(suffixes))]
        held = {n: there.read(n) for n in names if there.size(n) is not None}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not held:
        raise UserError(f"there is nothing at {path} that ends in {', '.join(suffixes)}.")
    sums = [[n, hashlib.sha256(data).hexdigest()] for n, data in sorted(held.items())]
    made = cache_folder() / "files" / hashlib.sha256(repr([root, sums]).encode()).hexdigest()

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        for n, data in held.items():
            (folder / n).write_bytes(data)

    if not made.is_dir():
        write_atomically(made, write)
    return str(made / name) if name else str(made)


class Opened:
    """The files of one folder, mapped into memory where they are used."""

    def __init__(self, path: str, cache_bytes: int) -> None:
        self.path, self.cache_bytes = path, cache_bytes
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # a run's thread reads ahead while another may evaluate

    def read(self, name: str) -> bytes:
        """A small file, whole, and not from the cache."""
        if is_remote(self.path):
            data = read_remote(join(self.path, name))
            assert data is not None
            return data
        try:
            return Path(self.path, name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{Path(self.path, name)} cannot be read: {error.strerror}. Give the folder of a "
                "token store."
            ) from error

    def file(self, part: Part) -> Path:
        """The local file of a part: its own, or its copy in the cache; raises UserError if damaged.

        Its size is checked here, its sha256 where it is copied and by `verify`.
        """
        name, num_bytes, sha256 = part
        if is_remote(self.path):
            return fetch(
                join(self.path, name),
                num_bytes=num_bytes,
                sha256=sha256,
                cache_bytes=self.cache_bytes,
            )
        file = Path(self.path, name)
        found = file.stat().st_size if file.is_file() else None
        if found != num_bytes:
            said = "is not there" if found is None else f"has {found} bytes"
            raise UserError(
                f"{file} {said}, and the manifest tells of {num_bytes}: copy it again, or prepare "
                "the store again."
            )
        return file

    def array(self, part: Part, dtype: str) -> np.ndarray:
        """A part as a one-dimensional array, mapped from its file."""
        with self._lock:
            found = self._maps.get(part[0])
            if found is None:
                self._close(part[1])
                file = self.file(part)
                # An empty file cannot be mapped.
                found = np.asarray(np.memmap(file, dtype, "r")) if part[1] else np.zeros(0, dtype)
                self._maps[part[0]] = found
            self._maps.move_to_end(part[0])
            return found

    def verify(self, name: str, told: Mapping[str, Any]) -> None:
        """Reads a part; raises UserError where it is not what the manifest tells."""
        part = name, int(told["bytes"]), str(told["sha256"])
        file = self.file(part)
        if (found := _sha256(file)) != told["sha256"]:
            if is_remote(self.path):
                file.unlink(missing_ok=True)
                self.file(part)  # which checks what it copies
                return
            raise UserError(
                f"{join(self.path, name)} is damaged: its sha256 is {found}, and the manifest says "
                f"{told['sha256']}. Copy it again, or prepare the store again."
            )

    def _close(self, coming: int) -> None:
        """Closes what was used longest ago: a file that is mapped keeps its place on the disk."""
        held = sum(array.nbytes for array in self._maps.values()) if is_remote(self.path) else 0
        while self._maps and (len(self._maps) >= MAX_MAPPED or held + coming > self.cache_bytes):
            _, array = self._maps.popitem(last=False)
            held -= array.nbytes


def fetch(url: str, *, num_bytes: int, sha256: str, cache_bytes: int) -> Path:
    """The copy of a file in the cache, made where it is not there.

    Of several processes that want the same file one copies it, and the others wait.
    """
    folder = cache_folder() / "shards"
    file = folder / sha256
    if _use(file, num_bytes):
        return file
    if num_bytes > cache_bytes:
        raise UserError(
            f"{url} has {num_bytes} bytes, and cache_bytes is {cache_bytes}: raise it to hold at "
            "least one shard, better all of them."
        )
    with _locked(folder / f"{sha256}.lock"):
        if not _use(file, num_bytes):
            with _locked(folder / "room.lock"):
                _make_room(folder, cache_bytes - num_bytes)
            write_atomically(file, lambda made: _copy(url, made, num_bytes, sha256))
    return file


def _use(file: Path, num_bytes: int) -> bool:
    """Whether a cached file is there and whole; if so it counts as used now."""
    try:
        if file.stat().st_size == num_bytes:
            os.utime(file)
            return True
        log.warning("%s in the cache is damaged, and is copied again", file)
        file.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return False


def _copy(url: str, made: Path, num_bytes: int, sha256: str) -> None:
    for attempt in range(3):
        found, size = hashlib.sha256(), 0
        try:
            with _open(url) as read, made.open("wb") as write:
                while chunk := read.read(_CHUNK):
                    write.write(chunk)
                    found.update(chunk)
                    size += len(chunk)
        except (UserError, FileNotFoundError) as error:
            raise UserError(f"{url} is not there, and the manifest names it: {error}.") from error
        except Exception as error:  # of botocore, gcsfs, aiohttp, ...: often gone a moment later
            if attempt == 2 or (isinstance(error, OSError) and error.filename == str(made)):
                raise UserError(f"{url} cannot be read: {error}.") from error
            time.sleep(2**attempt)
            continue
        if found.hexdigest() == sha256:
            return
    raise UserError(
        f"{url} is damaged: it has {size} bytes of the sha256 {found.hexdigest()}, and the "
        f"manifest tells of {num_bytes} of {sha256}. Put it there again, or prepare it again."
    )


def _make_room(folder: Path, allowed: int) -> None:
    """Removes files, those used longest ago first, until the rest is at most `allowed` bytes."""
    held, now = [], time.time()
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            told = file.stat()
            if file.suffix in (".lock", ".tmp"):
                if file.suffix == ".tmp" and now - told.st_mtime > _ABANDONED_S:
                    file.unlink()
                continue
            held.append((told.st_mtime_ns, told.st_size, file))
    total = sum(size for _, size, _ in held)
    for _, size, file in sorted(held):
        if total <= allowed:
            return
        file.unlink(missing_ok=True)
        total -= size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file's lock, which the system frees where the process dies; nothing without fcntl."""
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except ImportError:
        yield


def _open(url: str) -> Any:
    store, inside = store_of(url)
    return store.open(inside, "rb")


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as read:
        while chunk := read.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
