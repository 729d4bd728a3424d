"""Files of one JSON object a line: a kill can tear the last line, a disk damage any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(path: str | Path) -> list[dict[str, Any] | None]:
    """The objects of a file's lines; None for a damaged one. A torn last line is left out.

    Empty where there is no file.
    """
    path = Path(path)
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [_object(line) for line in whole]


def append_line(path: str | Path, row: Mapping[str, Any]) -> None:
    """Adds a line, in the place of a torn one if there is one."""
    with Path(path).open("a+b") as file:
        file.seek(0)
        torn = file.read().rpartition(b"\n")[2]
        if torn:
            file.truncate(file.tell() - len(torn))
        file.write(json.dumps(row).encode() + b"\n")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8; nested without end
        return None
    return found if isinstance(found, dict) else None
