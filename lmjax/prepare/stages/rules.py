"""Published rules of quality: Gopher's, C4's and FineWeb's, each with its threshold as a field.

A record is dropped for the first rule that it breaks, in the order of the fields; how many break
each rule, first or not, is counted. A threshold of None leaves its rule out. Words are what stands
between white space, as it is written, so that these rules are for scripts with spaces; lines are
stripped, and those that are empty left out.

Shape legend: N records, W words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lmjax.prepare.stage import Result, judged, with_column
from lmjax.prepare.stages import words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_BULLETS = (
    "\u2022",
    "\u2023",
    "\u2043",
    "\u25e6",
    "\u25aa",
    "\u25cf",
    "*",
    "-",
    "\u2013",
    "\u2014",
    "\u00b7",
)
_TERMINAL = (
    ".",
    "!",
    "?",
    '"',
    "\u201d",
    "'",
    "\u2019",
    "\u3002",
    "\uff01",
    "\uff1f",
    "\u2026",
    ":",
    ";",
)
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]", re.I)
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)")


class Rule(NamedTuple):
    """A rule applied to N records.

    Attributes:
      name: of the field that holds its threshold.
      values_N: what it measures.
      least, most: what is allowed, both themselves included; None for no limit.
    """

    name: str
    values_N: np.ndarray
    least: float | None
    most: float | None


@dataclass(frozen=True, kw_only=True)
class GopherQuality:
    """Documents of prose, by their words and lines.

    Source: Rae et al., arXiv:2112.11446, appendix A.1.1, "Quality filtering".

    Args:
      min_words: the least number of words.
      max_words: the largest.
      min_mean_word_length: in characters.
      max_mean_word_length: in characters.
      max_hash_ratio: "#" per word.
      max_ellipsis_ratio: "..." and "…" per word.
      max_bullet_lines: the fraction of lines that begin with a bullet.
      max_ellipsis_lines: the fraction of lines that end with an ellipsis.
      min_alphabetic_words: the fraction of words with at least one letter.
      min_stop_words: how many different ones of `stop_words` there must be.
      stop_words: words that no English text is without.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_hash_ratio: float | None = 0.1
    max_ellipsis_ratio: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: Sequence[str] = STOP_WORDS

    def __call__(self, records: pa.Table) -> Result:
        """Drops what breaks a rule."""
        return judge(records, (self._rules(texts) for texts in batches(records)))

    def _rules(self, texts: Sequence[str]) -> list[Rule]:
        found = words.spaced_words(texts)
        offsets = found.offsets_N1
        count = np.diff(offsets)
        per_word = np.maximum(count, 1)
        length = segment_sums(found.lengths_W, offsets) / per_word
        lines = [[line for line in map(str.strip, t.split("\n")) if line] for t in texts]
        num_lines = np.array([max(len(part), 1) for part in lines])
        bullets = [sum(line.startswith(_BULLETS) for line in part) for part in lines]
        trailing = [sum(line.endswith(("...", "…")) for line in part) for part in lines]
        hashes = np.array([text.count("#") for text in texts])
        ellipses = np.array([text.count("...") + text.count("…") for text in texts])
        stop = np.zeros(len(texts), np.int64)
        for one in words.spaced_words([" ".join(dict.fromkeys(self.stop_words))]).hashes_W:
            stop += segment_sums(found.hashes_W == one, offsets) > 0
        letters = segment_sums(found.letters_W, offsets) / per_word
        return [
            Rule("min_words", count, self.min_words, None),
            Rule("max_words", count, None, self.max_words),
            Rule("min_mean_word_length", length, self.min_mean_word_length, None),
            Rule("max_mean_word_length", length, None, self.max_mean_word_length),
            Rule("max_hash_ratio", hashes / per_word, None, self.max_hash_ratio),
            Rule("max_ellipsis_ratio", ellipses / per_word, None, self.max_ellipsis_ratio),
            Rule("max_bullet_lines", np.array(bullets) / num_lines, None, self.max_bullet_lines),
            Rule(
                "max_ellipsis_lines", np.array(trailing) / num_lines, None, self.max_ellipsis_lines
            ),
            Rule("min_alphabetic_words", letters, self.min_alphabetic_words, None),
            Rule("min_stop_words", stop, self.min_stop_words, None),
        ]


@dataclass(frozen=True, kw_only=True)
class FineWeb:
    """The three rules that were added to Gopher's and C4's for FineWeb.

    Source: Penedo et al., arXiv:2406.17557, section 3.6, which drops at these values too.

    Args:
      min_punctuated_lines: fraction of lines that end in punctuation; more is needed.
      max_duplicate_line_characters: fraction of characters in lines that stood before.
      max_short_lines: fraction of lines of fewer than `short_line` characters.
      short_line: in characters.
    """

    min_punctuated_lines: float | None = 0.12
    max_duplicate_line_characters: float | None = 0.1
    max_short_lines: float | None = 0.67
    short_line: int = 30

    def __call__(self, records: pa.Table) -> Result:
        """Drops what breaks a rule."""
        return judge(records, (self._rules(texts) for texts in batches(records)))

    def _rules(self, texts: Sequence[str]) -> list[Rule]:
        lines = [[line for line in map(str.strip, t.split("\n")) if line] for t in texts]
        count = np.array([max(len(part), 1) for part in lines])
        ends = np.array([sum(line.endswith(_TERMINAL) for line in part) for part in lines])
        short = np.array([sum(len(line) < self.short_line for line in part) for part in lines])
        _, again = zip(*map(repeats, lines), strict=True)
        low, high = self.min_punctuated_lines, self.max_duplicate_line_characters
        return [
            Rule("min_punctuated_lines", ends / count, _above(low), None),
            Rule("max_duplicate_line_characters", np.array(again), None, _below(high)),
            Rule("max_short_lines", short / count, None, _below(self.max_short_lines)),
        ]


@dataclass(frozen=True, kw_only=True)
class C4:
    """Lines that are sentences, of pages that are text: cuts lines, then drops pages.

    Source: Raffel et al., arXiv:1910.10683, section 2.2. Departures: sentences are counted by their
    punctuation; repeated spans are left to `Exact`, languages to `Language`.

    Args:
      terminal: lines that do not end in one of these are cut; () cuts none.
      min_line_words: shorter lines are cut.
      cut_lines_with: lines that hold one of these, in any case, are cut.
      min_sentences: pages with fewer, after that, are dropped.
      drop_pages_with: pages that hold one of these, in any case, are dropped.
      bad_words: pages that hold one of these as a word are dropped; there is no default list.
    """

    terminal: Sequence[str] = (".", "!", "?", '"')
    min_line_words: int = 5
    cut_lines_with: Sequence[str] = ("javascript", *POLICIES)
    min_sentences: int | None = 3
    drop_pages_with: Sequence[str] = ("lorem ipsum", "{")
    bad_words: Sequence[str] = ()

    def __call__(self, records: pa.Table) -> Result:
        """Cuts lines and citation marks; drops pages that break a rule."""
        bad = "|".join(re.escape(word) for word in self.bad_words)
        found_bad = re.compile(rf"(?<!\w)(?:{bad})(?!\w)", re.I).search if bad else None
        counts = dict.fromkeys(
            ("terminal", "min_line_words", "cut_lines_with", "citation marks cut"), 0
        )
        texts: list[str] = []
        reasons: list[str | None] = []
        details: list[str | None] = []
        for text in records["text"].to_pylist():
            small = text.lower()
            held = next((word for word in self.drop_pages_with if word in small), None)
            match = found_bad(text) if found_bad else None
            text = self._cut(text, counts)
            sentences = sum(1 for _ in _SENTENCE_END.finditer(text))
            texts.append(text)
            if held is not None:
                reasons.append("drop_pages_with")
                details.append(held)
            elif match is not None:
                reasons.append("bad_words")
                details.append(match[0])
            elif self.min_sentences is not None and sentences < self.min_sentences:
                reasons.append("min_sentences")
                details.append(f"{sentences} sentences")
            else:
                reasons.append(None)
                details.append(None)
        named = {n if " " in n else f"lines cut by {n}": c for n, c in counts.items()}
        records = with_column(records, "text", pa.array(texts, pa.large_string()))
        return judged(records, reasons, details=details, counts=named)

    def _cut(self, text: str, counts: dict[str, int]) -> str:
        terminal, kept = tuple(self.terminal), []
        if "[" in text:
            text, marks = _CITATION.subn("", text)
            counts["citation marks cut"] += marks
        for line in text.split("\n"):
            line = line.strip()
            if not line:
                continue
            if terminal and (not line.endswith(terminal) or line.endswith("...")):
                counts["terminal"] += 1
            elif len(line.split(None, self.min_line_words)) < self.min_line_words:
                counts["min_line_words"] += 1
            elif any(word in line.lower() for word in self.cut_lines_with):
                counts["cut_lines_with"] += 1
            else:
                kept.append(line)
        return "\n".join(kept)


def judge(records: pa.Table, batches: Iterable[Sequence[Rule]]) -> Result:
    """Drops records for the first rule they break; counts for each rule all that break it."""
    reasons: list[str | None] = []
    details: list[str | None] = []
    counts: dict[str, int] = {}
    for rules in batches:
        offset = len(reasons)
        size = len(rules[0].values_N)
        reasons += [None] * size
        details += [None] * size
        for rule in rules:
            if rule.least is None and rule.most is None:
                continue
            low = -np.inf if rule.least is None else rule.least
            high = np.inf if rule.most is None else rule.most
            broken = np.flatnonzero((rule.values_N < low) | (rule.values_N > high))
            name = f"breaks {rule.name}"
            counts[name] = counts.get(name, 0) + len(broken)
            for i in broken.tolist():
                if reasons[offset + i] is None:
                    reasons[offset + i] = rule.name
                    details[offset + i] = f"{rule.values_N[i]:.6g}"
    return judged(records, reasons, details=details, counts=counts)


def batches(records: pa.Table) -> Iterator[list[str]]:
    """The texts of records, some hundred thousand characters at a time."""
    texts = records["text"].to_pylist()
    for piece in words.chunks(texts):
        yield texts[piece]


def segment_sums(values_W: np.ndarray, offsets_N1: np.ndarray) -> np.ndarray:
    """The sum of the values of each text's words; 0 for a text without words."""
    sums = np.concatenate([[0], np.cumsum(values_W)])
    return sums[offsets_N1[1:]] - sums[offsets_N1[:-1]]


def repeats(parts: Sequence[str]) -> tuple[float, float]:
    """The fraction of parts that stood before, and of characters in them."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0.0, 0.0
    total = sum(map(len, parts))
    return 1 - len(distinct) / len(parts), 1 - sum(map(len, distinct)) / total


def _above(limit: float | None) -> float | None:
    return None if limit is None else float(np.nextafter(limit, np.inf))


def _below(limit: float | None) -> float | None:
    return None if limit is None else float(np.nextafter(limit, -np.inf))
