"""Exact duplicates across all sources: whole documents, paragraphs or lines.

What stands first, in the order of records, stays. Texts are compared by a hash of 128 bits: among
10^12 of them some two differ and are held equal with a chance of 10^-15.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.stage import Result, judged, with_column

_SEPARATORS = {"document": "", "paragraph": "\n\n", "line": "\n"}
Unit = Literal["document", "paragraph", "line"]
Normalise = Literal["none", "space", "case"]


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Drops documents, or cuts paragraphs or lines, that stood earlier in any record.

    Source: lines as in CCNet, arXiv:1911.00359, section 3.1, across all sources instead of shards.

    Args:
      unit: "document"; "paragraph", between empty lines; or "line".
      normalise: "none" compares as written; "space" without regard to white space, and "case" to
        white space and case.
      min_characters: shorter paragraphs and lines ("}", "Chapter 2") are never cut.
    """

    unit: Unit = "document"
    normalise: Normalise = "space"
    min_characters: int = 30

    def __post_init__(self) -> None:
        if self.unit not in _SEPARATORS:
            raise UserError(f"unit={self.unit!r}." + did_you_mean(self.unit, _SEPARATORS))
        if self.normalise not in (allowed := get_args(Normalise)):
            raise UserError(
                f"normalise={self.normalise!r}." + did_you_mean(self.normalise, allowed)
            )

    def keys(self, records: pa.Table) -> pa.Table:
        """Hashes of the units in two halves, `key` and `rest`; `id`, `order`, and the `part`.

        `part` is the unit's place in its record.
        """
        keys: list[bytes] = []
        parts: list[int] = []
        counts: list[int] = []
        for text in records["text"].to_pylist():
            before = len(keys)
            for part, piece in enumerate(self._units(text)):
                plain = self._normal(piece)
                if self.unit == "document" or len(plain) >= max(self.min_characters, 1):
                    data = plain.encode(errors="surrogatepass")
                    keys.append(hashlib.blake2b(data, digest_size=16).digest())
                    parts.append(part)
            counts.append(len(keys) - before)
        rows = pa.array(np.repeat(np.arange(len(records)), counts))
        halves = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        return pa.table(
            {
                "key": halves[:, 0].copy(),
                "rest": halves[:, 1].copy(),
                "id": records["id"].combine_chunks().take(rows),
                "order": records["order"].combine_chunks().take(rows),
                "part": pa.array(parts, pa.int32()),
            }
        )

    def reduce(self, rows: pa.Table) -> pa.Table:
        """Each unit but the first of its key: `id`, `order`, `part`, and the id of the first."""
        # A record may hold the same line twice, so that (key, order) are not enough to sort by.
        names = ("part", "order", "rest", "key")
        sort = np.lexsort([rows[name].to_numpy() for name in names])
        keys, rests = rows["key"].to_numpy()[sort], rows["rest"].to_numpy()[sort]
        new = np.ones(len(sort), bool)
        new[1:] = (keys[1:] != keys[:-1]) | (rests[1:] != rests[:-1])
        first = sort[np.maximum.accumulate(np.where(new, np.arange(len(sort)), 0))]
        again, heads = pa.array(sort[~new]), pa.array(first[~new])
        return pa.table(
            {
                "id": rows["id"].take(again),
                "order": rows["order"].take(again),
                "part": rows["part"].take(again),
                "kept": rows["id"].take(heads),
            }
        )

    def decide(self, records: pa.Table, decisions: pa.Table) -> Result:
        """Drops duplicates; a record whose units were all cut, or were blank, is dropped too."""
        reasons: list[str | None] = [None] * len(records)
        details: list[str | None] = [None] * len(records)
        ids = records["id"].to_pylist()
        place = {name: i for i, name in enumerate(ids)}
        named = sorted(
            zip(
                (place[name] for name in decisions["id"].to_pylist()),
                decisions["part"].to_pylist(),
                decisions["kept"].to_pylist(),
                strict=True,
            )
        )
        if self.unit == "document":
            for row, _, kept in named:
                reasons[row], details[row] = "duplicate document", kept
            return judged(records, reasons, details=details)
        texts: list[str] | None = None
        cut = characters = 0
        for row, group in groupby(named, key=lambda decision: decision[0]):
            texts = records["text"].to_pylist() if texts is None else texts
            found = list(group)
            gone = {part for _, part, _ in found}
            units = self._units(texts[row])
            left = _SEPARATORS[self.unit].join(u for i, u in enumerate(units) if i not in gone)
            cut += len(gone)
            characters += sum(len(units[part]) for part in gone)
            if not left.strip():
                reasons[row], details[row] = f"every {self.unit} is a duplicate", found[0][2]
            texts[row] = left
        if texts is not None:
            records = with_column(records, "text", pa.array(texts, pa.large_string()))
        counts = {
            f"duplicate {self.unit}s": cut,
            f"characters in duplicate {self.unit}s": characters,
        }
        return judged(records, reasons, details=details, counts=counts)

    def _units(self, text: str) -> Sequence[str]:
        return [text] if self.unit == "document" else text.split(_SEPARATORS[self.unit])

    def _normal(self, text: str) -> str:
        if self.normalise == "none":
            return text
        text = " ".join(text.split())
        return text.lower() if self.normalise == "case" else text
