"""Where what was computed from a corpus is kept: $LMJAX_CACHE, or ~/.cache/lmjax."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """The root of the cache; it need not exist yet."""
    return Path(os.environ.get("LMJAX_CACHE", "~/.cache/lmjax")).expanduser()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Makes the file or folder `path` by `write(temporary)`, so that readers see all of it or none.

    Of several processes that make the same path at once, one wins and the others' work is dropped:
    the name of a cached thing is a hash of what it was made from, so all made the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(made)
        made.rename(path)
    except OSError:
        if not path.exists():
            raise
    finally:
        if made.is_dir():
            shutil.rmtree(made)
        made.unlink(missing_ok=True)
