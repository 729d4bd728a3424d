"""A folder of files here or in an object store, each of which is there whole or not at all.

On a disk a file is written under another name and renamed. An object store renames nothing, and
need not: an object appears when its last byte has arrived, and replaces another in one step.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lmjax.errors import UserError

DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
}


def is_remote(path: str) -> bool:
    """Whether a path is an address (s3://bucket/folder)."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """The path or address of a name in a folder."""
    return f"{folder.rstrip('/')}/{name}" if name else folder


def store_of(path: str) -> tuple[Any, str]:
    """The file system of an address, which remembers no listings, and the path inside it.

    Raises UserError where its driver is not installed, or does not know the address.
    """
    scheme = path.partition("://")[0]
    try:
        import fsspec

        store, inside = fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ImportError as error:
        driver = DRIVERS.get(scheme, "a driver of fsspec")
        raise UserError(
            f"{path} cannot be opened: {scheme}:// needs `pip install fsspec {driver}` ({error})."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} cannot be opened: {error}. Addresses begin with s3://, gs:// or hf://, or any "
            "other scheme that fsspec knows."
        ) from error
    return store, str(inside).rstrip("/")


@contextlib.contextmanager
def told(url: str, what: str) -> Iterator[None]:
    """Raises what goes wrong in a store as an OSError that names the address; FileNotFoundError
    and UserError as they are."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # of botocore, gcsfs, aiohttp, ...: each has its own
        kind = type(error).__name__
        said = str(error) or kind
        raise OSError(
            f"{url} cannot be {what}: {said if kind in said else f'{kind}: {said}'}. Check the "
            "address, the rights and the network."
        ) from error


@dataclass(frozen=True)
class Folder:
    """A folder, which need not be there before the first file is written. Names are relative.

    Raises OSError, with the name or address, for what a disk or a store refuses.
    """

    path: str

    def __truediv__(self, name: str) -> Folder:
        return Folder(join(self.path, name))

    @property
    def is_remote(self) -> bool:
        """Whether it lies in an object store."""
        return is_remote(self.path)

    def at(self, name: str) -> str:
        """The path or address of a file."""
        return join(self.path, name)

    def read(self, name: str) -> bytes:
        """A file's bytes; raises FileNotFoundError where there is none."""
        if not self.is_remote:
            return Path(self.path, name).read_bytes()
        with told(self.at(name), "read"):
            return cast(bytes, self._store[0].cat_file(self._inside(name)))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes (first, one past the last) of some files; of a store many at once."""
        if self.is_remote:
            with told(self.path, "read"):
                names, begins, ends = zip(*ranges, strict=True) if ranges else ((), (), ())
                paths = [self._inside(name) for name in names]
                found = self._store[0].cat_ranges(paths, list(begins), list(ends), on_error="raise")
                return [bytes(data) for data in found]
        held = []
        for name, begin, end in ranges:
            with Path(self.path, name).open("rb") as file:
                file.seek(begin)
                held.append(file.read(end - begin))
        return held

    def size(self, name: str) -> int | None:
        """A file's bytes; None where there is none."""
        try:
            if not self.is_remote:
                return Path(self.path, name).stat().st_size
            with told(self.at(name), "read"):
                return int(self._store[0].info(self._inside(name))["size"])
        except FileNotFoundError:
            return None

    def write(self, name: str, data: Any) -> None:
        """Makes or replaces a file; `data` is bytes, or what gives a view of them."""
        if self.is_remote:
            with told(self.at(name), "written"):
                self._store[0].pipe_file(self._inside(name), bytes(data))
            return
        with self.create(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A file to write and seek in, which appears when the block ends without an error."""
        path = Path(tempfile.gettempdir(), "lmjax") if self.is_remote else Path(self.path, name)
        made = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        made.parent.mkdir(parents=True, exist_ok=True)
        try:
            with made.open("wb") as file:
                yield file
                file.flush()
                if not self.is_remote:
                    os.fsync(file.fileno())  # or else the rename may outlive a power cut, alone
            if self.is_remote:
                with told(self.at(name), "written"):
                    self._store[0].put_file(str(made), self._inside(name))
            else:
                made.rename(path)
        except OSError as error:  # of a full disk, which tells no name
            if error.errno is not None and error.filename is None:
                error.filename = str(path)
            raise
        finally:
            made.unlink(missing_ok=True)

    def names(self, pattern: str = "*") -> list[str]:
        """The files and folders right in it whose names match, sorted; none where it is not."""
        try:
            if self.is_remote:
                with told(self.path, "listed"):
                    found = self._store[0].ls(self._store[1], detail=False)
                held = {str(name).rstrip("/").rpartition("/")[2] for name in found}
            else:
                held = set(os.listdir(self.path))
        except FileNotFoundError:
            return []
        return sorted(name for name in held if name and fnmatch.fnmatchcase(name, pattern))

    def files(self) -> dict[str, int]:
        """All files below it, by name, with their bytes."""
        if self.is_remote:
            with told(self.path, "listed"):
                store, root = self._store
                found = store.find(root, detail=True)
            return {name[len(root) + 1 :]: int(i["size"] or 0) for name, i in found.items()}
        return {
            file.relative_to(self.path).as_posix(): file.stat().st_size
            for file in Path(self.path).rglob("*")
            if file.is_file()
        }

    def remove(self, names: Sequence[str]) -> None:
        """Removes files that may be there."""
        if not self.is_remote:
            for name in names:
                Path(self.path, name).unlink(missing_ok=True)
        elif names:
            with contextlib.suppress(FileNotFoundError), told(self.path, "removed"):
                self._store[0].rm([self._inside(name) for name in names])

    def remove_all(self) -> None:
        """Removes the folder and all below it, if it is there."""
        if not self.is_remote:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        with contextlib.suppress(FileNotFoundError), told(self.path, "removed"):
            self._store[0].rm(self._store[1], recursive=True)

    def copy(self, name: str, to: Folder) -> None:
        """Gives another folder a file of this one, by a link or inside the store where it can."""
        if self.is_remote:
            with told(to.at(name), "written"):
                self._store[0].copy(self._inside(name), to._inside(name))
            return
        source, target = Path(self.path, name), Path(to.path, name)
        made = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        made.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                os.link(source, made)
            except OSError:  # another file system, or one without links
                shutil.copy2(source, made)
            made.rename(target)
        finally:
            made.unlink(missing_ok=True)

    @functools.cached_property
    def _store(self) -> tuple[Any, str]:
        return store_of(self.path)

    def _inside(self, name: str) -> str:
        return join(self._store[1], name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Connected anew in another process."""
        return Folder, (self.path,)
