"""Where what was computed from a corpus is kept: $LMJAX_CACHE, or ~/.cache/lmjax."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

from lmjax.errors import UserError

log = logging.getLogger("lmjax")

_SUMS = "sums.json"  # in a cached folder: the CRC-32 of each of its other files


def cache_folder() -> Path:
    """The root of the cache; it need not exist yet."""
    return Path(os.environ.get("LMJAX_CACHE", "~/.cache/lmjax")).expanduser()


def read_sealed(path: Path) -> str | None:
    """The text that `write_sealed` wrote; None, and a warning, where the file is damaged."""
    if not path.exists():
        return None
    try:
        seal, _, text = path.read_text("utf-8").partition("\n")
        if seal == hashlib.sha256(text.encode()).hexdigest():
            return text
    except ValueError:  # no UTF-8
        pass
    log.warning("%s in the cache is damaged, and is made again", path)
    path.unlink(missing_ok=True)
    return None


def write_sealed(path: Path, text: str) -> None:
    """Writes the text below its sha256, atomically."""
    sealed = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    write_atomically(path, lambda made: made.write_text(sealed, "utf-8"))


def seal_folder(folder: Path) -> None:
    """Writes the sums of the folder's files into it."""
    sums = {file.name: _crc(file) for file in sorted(folder.iterdir())}
    (folder / _SUMS).write_text(json.dumps(sums))


def is_sealed(folder: Path) -> bool:
    """Whether the folder is there and its files are as `seal_folder` saw them.

    One that is damaged is removed, with a warning.
    """
    if not folder.exists():
        return False
    try:
        sums = json.loads((folder / _SUMS).read_text())
        if all(_crc(folder / name) == crc for name, crc in sums.items()):
            return True
    except (OSError, ValueError, AttributeError):  # a file is gone, or the sums themselves are bad
        pass
    log.warning("%s in the cache is damaged, and is made again", folder)
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as read:
        while chunk := read.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Makes the file or folder `path` by `write(temporary)`, so that readers see all of it or none.

    Of several processes that make the same path at once, one wins and the others' work is dropped:
    the name of a cached thing is a hash of what it was made from, so all made the same. Raises
    UserError where the cache cannot be written.
    """
    made = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(made)
        made.rename(path)
    except OSError as error:
        if not path.exists():
            raise UserError(
                f"the cache cannot hold {path} ({error.strerror or error}): make room, or set "
                "LMJAX_CACHE to a folder that can be written."
            ) from error
    finally:
        if made.is_dir():
            shutil.rmtree(made)
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
