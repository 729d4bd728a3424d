"""Rows that cannot be used: counted by reason, logged, and listed in a file below the cache."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import NamedTuple

from lmjax.data.cache import cache_folder, write_atomically

log = logging.getLogger("lmjax")

_RAW = 200  # of a bad row, how many characters are kept


class Bad(NamedTuple):
    """A row that cannot be used: where it lies, why not, and how it begins."""

    name: str
    reason: str
    raw: str


def beginning(raw: str) -> str:
    """What is kept of a bad row."""
    return raw[:_RAW].encode("utf-8", "replace").decode()


def counted(bad: Sequence[Bad]) -> str:
    """How many for which reason."""
    counts = collections.Counter(row.reason for row in bad)
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common()) or "no rows"


def as_jsonl(bad: Sequence[Bad]) -> str:
    """The bad rows, one in each line."""
    return "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in bad)


def set_aside(path: str, num_good: int, bad: Sequence[Bad]) -> None:
    """Lists the bad rows of a corpus in a file, and says how many they are, why, and in which file.

    Args:
      path: of the corpus.
      num_good: how many of its rows are read.
      bad: the others; where there is none, nothing is said.
    """
    if not bad:
        return
    text = as_jsonl(bad)
    name = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    file = cache_folder() / "quarantine" / f"{name}.jsonl"
    if not file.exists():
        write_atomically(file, lambda made: made.write_text(text, "utf-8", "replace"))
    log.warning(
        "%s: %d rows are read and %d set aside (%s), listed in %s",
        *(path, num_good, len(bad), counted(bad), file),
    )
