"""Where readers put what they find: records that can be read, and those that cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
import pyarrow as pa

from lmjax.prepare.files import File
from lmjax.prepare.stage import QUARANTINED, RECORD, Result, beginning


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file, or a part of one that can be read by itself.

    Attributes:
      file: the file.
      begin, end: the part, in units of the format's own (bytes, row groups); `end` -1 for all.
      first: the number of its first record in the file.
    """

    file: File
    begin: int = 0
    end: int = -1
    first: int = 0


@dataclass
class Sheet:
    """Records of one source, gathered until there are enough for a table.

    Every record that a reader sees is either added or told to be bad: `seen` counts both.
    """

    source: str
    texts: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    metas: list[str] = field(default_factory=list)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    chars: int = 0
    file: str = ""

    def begin(self, file: File) -> None:
        """Records that follow are of this file; bytes of its name that are no text are spelled."""
        self.file = file.name.encode(errors="surrogateescape").decode(errors="backslashreplace")

    def add(self, number: int, text: str, meta: str = "") -> None:
        """A record that was read: its number in the file, and its other fields as JSON."""
        self.ids.append(f"{self.source}/{self.file}#{number}")
        self.texts.append(text)
        self.metas.append(meta)
        self.chars += len(text)

    def bad(self, number: int, offset: int, reason: str, raw: bytes | str | None) -> None:
        """A record that was not, or the rest of a file: where it begins, why, and its beginning."""
        self.quarantined.append(
            {
                "id": f"{self.source}/{self.file}#{number}",
                "file": self.file,
                "offset": offset,
                "reason": reason,
                "raw": beginning(raw),
            }
        )

    def take(self) -> Result:
        """All that was gathered, which is then forgotten. Texts are valid Unicode."""
        kept = pa.table(
            [
                pa.array(self.ids, pa.string()),
                pa.array(self.texts, pa.large_string()),
                pa.array([self.source] * len(self.ids), pa.string()),
                pa.array(self.metas, pa.string()),
            ],
            schema=RECORD,
        )
        bad = pa.Table.from_pylist(self.quarantined, schema=QUARANTINED)
        result = Result(kept=kept, quarantined=bad, counts=dict(self.counts))
        self.texts, self.ids, self.metas, self.quarantined = [], [], [], []
        self.counts, self.chars = Counter(), 0
        return result


def to_meta(fields: dict[str, Any]) -> str:
    """Fields of a record as JSON; "" for none. What JSON cannot hold is spelled by `str`."""
    fields = {key: value for key, value in fields.items() if value is not None}
    if not fields:
        return ""
    return orjson.dumps(fields, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class Stream(Protocol):
    """Bytes that are read in order."""

    def read(self, size: int = -1, /) -> bytes:
        """At most so many bytes, or all; b"" at the end."""
