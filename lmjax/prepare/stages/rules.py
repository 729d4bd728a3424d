"""Published rules of quality: Gopher's, C4's and FineWeb's, each with its threshold as a field.

A record is dropped for the first rule that it breaks, in the order of the fields; how many break
each rule, first or not, is counted. A threshold of None leaves its rule out. Words are what stands
between white space, as it is written, so that these rules are for scripts with spaces, unless
`words` is "script"; lines are stripped, and those that are empty left out.

Shape legend: N records, W words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from lmjax.errors import UserError, did_you_mean
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
# Ends of sentences and quotations: Latin's, Chinese and Japanese, Arabic and Urdu, Devanagari.
TERMINAL = (
    ".",
    "!",
    "?",
    '"',
    "\u201d",
    "'",
    "\u2019",
    "\u2026",
    "\u3002",
    "\uff01",
    "\uff1f",
    "\u061f",
    "\u06d4",
    "\u0964",
)
_begins_with_bullet = methodcaller("startswith", _BULLETS)
Wording = Literal["spaces", "script"]
_WORDINGS = {"spaces": words.spaced_words, "script": words.normal_words}
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
      words: "spaces"; "script" leaves punctuation out and capitals, and counts each letter of
        Chinese, Japanese, Thai, ... as a word: without it a text in those has too few. Such words
        have one character: set min_mean_word_length to None, and other stop_words or none.
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
    words: Wording = "spaces"

    def __post_init__(self) -> None:
        """Refuses words that are none."""
        check_wording(self.words)

    def __call__(self, records: pa.Table) -> Result:
        """Drops what breaks a rule."""
        return judge(records, (self._rules(texts) for texts in batches(records)))

    def _rules(self, texts: Sequence[str]) -> list[Rule]:
        found = words_of(texts, self.words)
        offsets = found.offsets_N1
        count = np.diff(offsets)
        per_word = np.maximum(count, 1)
        length = segment_sums(found.lengths_W, offsets) / per_word
        lines = [[line for line in map(str.strip, t.split("\n")) if line] for t in texts]
        num_lines = np.array([max(len(part), 1) for part in lines])
        bullets = [sum(map(_begins_with_bullet, part)) for part in lines]
        trailing = [
            sum(line.endswith(("...", "…")) for line in part) if "..." in t or "…" in t else 0
            for part, t in zip(lines, texts, strict=True)
        ]
        hashes = np.array([text.count("#") for text in texts])
        ellipses = np.array([text.count("...") + text.count("…") for text in texts])
        stop = np.zeros(len(texts), np.int64)
        for one in np.unique(words_of([" ".join(self.stop_words)], self.words).hashes_W):
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

    Source: Penedo et al., arXiv:2406.17557, section 3.6, which drops at these values too. The
    released code differs from the paper: it drops from 0.01 of duplicate characters, and from 0.3
    newlines per word (`max_newlines_per_word`), a rule that the paper does not have.

    Args:
      min_punctuated_lines: fraction of lines that end in punctuation; more is needed.
      max_duplicate_line_characters: fraction of characters in lines that stood before.
      max_short_lines: fraction of lines of fewer than `short_line` characters.
      short_line: in characters.
      max_newlines_per_word: newlines that end a line with text, per word.
      terminal: what counts as punctuation at the end of a line.
    """

    min_punctuated_lines: float | None = 0.12
    max_duplicate_line_characters: float | None = 0.1
    max_short_lines: float | None = 0.67
    short_line: int = 30
    max_newlines_per_word: float | None = None
    terminal: Sequence[str] = TERMINAL

    def __call__(self, records: pa.Table) -> Result:
        """Drops what breaks a rule."""
        return judge(records, (self._rules(texts) for texts in batches(records)))

    def _rules(self, texts: Sequence[str]) -> list[Rule]:
        lines = [[line for line in map(str.strip, t.split("\n")) if line] for t in texts]
        count = np.array([max(len(part), 1) for part in lines])
        marks = tuple(self.terminal)
        ends = np.array([sum(line.endswith(marks) for line in part) for part in lines])
        short = np.array([sum(len(line) < self.short_line for line in part) for part in lines])
        _, again = zip(*map(repeats, lines), strict=True)
        low, high = self.min_punctuated_lines, self.max_duplicate_line_characters
        rules = [
            Rule("min_punctuated_lines", ends / count, _above(low), None),
            Rule("max_duplicate_line_characters", np.array(again), None, _below(high)),
            Rule("max_short_lines", short / count, None, _below(self.max_short_lines)),
        ]
        if self.max_newlines_per_word is not None:
            num_words = np.maximum(np.diff(words.spaced_words(texts).offsets_N1), 1)
            newlines = (count - 1) / num_words
            rules.append(Rule("max_newlines_per_word", newlines, None, self.max_newlines_per_word))
        return rules


@dataclass(frozen=True, kw_only=True)
class C4:
    """Lines that are sentences, of pages that are text: cuts lines, then drops pages.

    Source: Raffel et al., arXiv:1910.10683, section 2.2. Departures: sentences are counted by their
    punctuation; repeated spans are left to `Exact`, languages to `Language`.

    Args:
      terminal: lines that do not end in one of these are cut; () cuts none.
      min_line_words: shorter lines are cut.
      max_word_length: lines with a longer word are cut, as by the published code; None cuts none.
      cut_lines_with: lines that hold one of these, in any case, are cut.
      min_sentences: pages with fewer, after that, are dropped.
      drop_pages_with: pages that hold one of these, in any case, are dropped.
      bad_words: pages that hold one of these as a word are dropped; there is no default list.
    """

    terminal: Sequence[str] = (".", "!", "?", '"')
    min_line_words: int = 5
    max_word_length: int | None = 1000
    cut_lines_with: Sequence[str] = ("javascript", *POLICIES)
    min_sentences: int | None = 3
    drop_pages_with: Sequence[str] = ("lorem ipsum", "{")
    bad_words: Sequence[str] = ()

    def __call__(self, records: pa.Table) -> Result:
        """Cuts lines and citation marks; drops pages that break a rule."""
        bad = "|".join(re.escape(word) for word in self.bad_words)
        found_bad = re.compile(rf"(?<!\w)(?:{bad})(?!\w)", re.I).search if bad else None
        counts = dict.fromkeys(
            (
                "max_word_length",
                "terminal",
                "min_line_words",
                "cut_lines_with",
                "citation marks cut",
            ),
            0,
        )
        texts: list[str] = []
        reasons: list[str | None] = []
        details: list[str | None] = []
        for text in records["text"].to_pylist():
            small = text.lower()
            held = next((word for word in self.drop_pages_with if word in small), None)
            match = found_bad(text) if found_bad else None
            text = self._cut(text, small, counts)
            sentences = len(_SENTENCE_END.findall(text))
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

    def _cut(self, text: str, small: str, counts: dict[str, int]) -> str:
        terminal, kept = tuple(self.terminal), []
        longest = len(text) if self.max_word_length is None else self.max_word_length
        if "[" in text:
            text, marks = _CITATION.subn("", text)
            counts["citation marks cut"] += marks
            small = text.lower() if marks else small
        cut_with = [word for word in self.cut_lines_with if word in small]  # of few texts any
        for line in text.split("\n"):
            line = line.strip()
            if not line:
                continue
            if len(line) > longest and _longest(line, longest):
                counts["max_word_length"] += 1
            elif terminal and (not line.endswith(terminal) or line.endswith("...")):
                counts["terminal"] += 1
            elif len(line.split(None, self.min_line_words)) < self.min_line_words:
                counts["min_line_words"] += 1
            elif cut_with and any(word in line.lower() for word in cut_with):
                counts["cut_lines_with"] += 1
            else:
                kept.append(line)
        return "\n".join(kept)


def check_wording(words: str) -> None:
    """Raises UserError for a kind of words that there is not."""
    if words not in (allowed := get_args(Wording)):
        raise UserError(f"words={words!r}." + did_you_mean(words, allowed))


def words_of(texts: Sequence[str], wording: Wording) -> words.Words:
    """The words of texts, told apart by spaces or as their script does."""
    return _WORDINGS[wording](texts)


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
    again = total - sum(map(len, distinct))
    return (len(parts) - len(distinct)) / len(parts), again / total


def _longest(line: str, limit: int) -> bool:
    """Whether a line has a word of more characters; a word of a script without spaces has none."""
    return any(len(w) > limit and w.isascii() for w in line.split())


def _above(limit: float | None) -> float | None:
    return None if limit is None else float(np.nextafter(limit, np.inf))


def _below(limit: float | None) -> float | None:
    return None if limit is None else float(np.nextafter(limit, -np.inf))
