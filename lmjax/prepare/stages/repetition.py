"""Text that repeats itself: Gopher's limits on lines, paragraphs and n-grams inside a document.

Shape legend: N records, W words, G n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lmjax.prepare.stage import Result
from lmjax.prepare.stages import words
from lmjax.prepare.stages.rules import (
    Rule,
    Wording,
    batches,
    check_wording,
    judge,
    repeats,
    segment_sums,
    words_of,
)

_TOP, _DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Drops documents of which too much repeats.

    Source: Rae et al., arXiv:2112.11446, table A1. Departures: characters are counted in words,
    without white space; what stands once repeats nothing, even where it is all of a document.

    A line, or a paragraph (between empty lines), is a duplicate if it stood before. The top n-gram
    is the most frequent, of equals the longest; its fraction is of all characters in words, as is
    that of words in n-grams that stand twice or more, no word counted twice.

    Args:
      duplicate_lines: the largest fraction of lines that are duplicates.
      duplicate_paragraphs: of paragraphs.
      duplicate_line_characters: of characters in duplicate lines.
      duplicate_paragraph_characters: in duplicate paragraphs.
      top_2gram: in the top 2-gram.
      top_3gram: in the top 3-gram.
      top_4gram: in the top 4-gram.
      duplicate_5grams: in duplicate 5-grams.
      duplicate_6grams: in duplicate 6-grams.
      duplicate_7grams: in duplicate 7-grams.
      duplicate_8grams: in duplicate 8-grams.
      duplicate_9grams: in duplicate 9-grams.
      duplicate_10grams: in duplicate 10-grams.
      words: as those of `GopherQuality`; limits on n-grams are made for words with spaces.
    """

    duplicate_lines: float | None = 0.30
    duplicate_paragraphs: float | None = 0.30
    duplicate_line_characters: float | None = 0.20
    duplicate_paragraph_characters: float | None = 0.20
    top_2gram: float | None = 0.20
    top_3gram: float | None = 0.18
    top_4gram: float | None = 0.16
    duplicate_5grams: float | None = 0.15
    duplicate_6grams: float | None = 0.14
    duplicate_7grams: float | None = 0.13
    duplicate_8grams: float | None = 0.12
    duplicate_9grams: float | None = 0.11
    duplicate_10grams: float | None = 0.10
    words: Wording = "spaces"

    def __post_init__(self) -> None:
        """Refuses words that are none."""
        check_wording(self.words)

    def __call__(self, records: pa.Table) -> Result:
        """Drops what breaks a rule."""
        return judge(records, (self._rules(texts) for texts in batches(records)))

    def _rules(self, texts: Sequence[str]) -> list[Rule]:
        measured = {**_parts(texts), **_ngrams(words_of(texts, self.words))}
        return [Rule(name, values, None, getattr(self, name)) for name, values in measured.items()]


def _parts(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Fractions of lines and paragraphs that stood before, and of characters in them."""
    lines = [repeats([p for p in map(str.strip, text.split("\n")) if p]) for text in texts]
    blocks = [repeats([p for p in map(str.strip, text.split("\n\n")) if p]) for text in texts]
    lines_N2, blocks_N2 = np.array(lines), np.array(blocks)
    return {
        "duplicate_lines": lines_N2[:, 0],
        "duplicate_paragraphs": blocks_N2[:, 0],
        "duplicate_line_characters": lines_N2[:, 1],
        "duplicate_paragraph_characters": blocks_N2[:, 1],
    }


def _ngrams(found: words.Words) -> dict[str, np.ndarray]:
    """Fractions of characters in the top n-gram, and in n-grams that stand more than once."""
    num_texts = len(found.offsets_N1) - 1
    lengths_W, offsets = found.lengths_W, found.offsets_N1
    ends_W1 = np.concatenate([[0], np.cumsum(lengths_W)])
    total_N = np.maximum(segment_sums(lengths_W, offsets), 1)
    text_W = np.repeat(np.arange(num_texts), np.diff(offsets))
    # One hash for a word in one text: equal n-grams of different texts are then different.
    own_W = words.mix(found.hashes_W ^ words.mix(text_W.astype(np.uint64)))
    # A longer n-gram can stand twice only where a shorter one does: candidates dwindle.
    at = np.arange(len(own_W))
    # The n-gram that begins at a word: the sum of its words times powers of a prime.
    sums_W, factor = own_W.copy(), 1
    out: dict[str, np.ndarray] = {}
    for n in (*_TOP, *_DUPLICATE):
        inside = at + n <= len(own_W)
        inside[inside] = text_W[at[inside] + n - 1] == text_W[at[inside]]
        at, factor = at[inside], factor * int(words.PRIME) & 0xFFFFFFFFFFFFFFFF
        sums_W[at] += own_W[at + n - 1] * np.uint64(factor)
        at, first, count = _repeated(words.mix(sums_W[at]), at)
        if n in _TOP:
            top_N = np.zeros((2, num_texts), np.int64)
            size = ends_W1[first + n] - ends_W1[first]
            best = np.lexsort((size, count))  # the last of a text wins
            top_N[:, text_W[first[best]]] = count[best], size[best]
            out[f"top_{n}gram"] = top_N[0] * top_N[1] / total_N
        else:
            steps = np.zeros(len(own_W) + 1, np.int64)
            steps[at] = 1  # places are distinct
            steps[at + n] -= 1
            covered_W = np.cumsum(steps[:-1]) > 0
            out[f"duplicate_{n}grams"] = segment_sums(covered_W * lengths_W, offsets) / total_N
    return out


def _repeated(hashes_G: np.ndarray, at_G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of what stands twice or more: where each stands; where each first does, and how often."""
    sort = np.argsort(hashes_G)
    ordered = hashes_G[sort]
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(new)
    count = np.diff(np.append(starts, len(ordered)))
    again = np.zeros(len(ordered), bool)
    again[sort] = np.repeat(count > 1, count)
    first = np.minimum.reduceat(at_G[sort], starts) if len(starts) else at_G
    return at_G[again], first[count > 1], count[count > 1]
