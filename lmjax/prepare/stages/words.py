"""The words of many texts at once, as flat arrays: what rules, near-duplicates and n-grams share.

Texts are joined, and read as code points; a word is a run of them. Its hash is a polynomial of its
code points modulo 2^64, taken from one running sum over the whole batch, and mixed: so hashing
costs a few vector operations a character, whatever the number of words.

Shape legend: N texts, C characters, W words, G n-grams.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Characters that are worked on at once: their arrays (8 bytes a character) stay in the cache.
CHUNK = 1 << 17
PRIME = np.uint64(0x9E3779B97F4A7C15)
# Scripts whose words are not spaced: each of their letters is a word of its own.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # hiragana, katakana
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, further extensions
)
# What a code point does: it is part of a word, or a word by itself; and it is a letter.
_RUN, _ALONE, _LETTER = 1, 2, 4
_PLANES = 0x40000  # code points above hold no letters


@dataclass(frozen=True)
class Words:
    """The words of N texts.

    Attributes:
      hashes_W: uint64, one a word.
      starts_W: where each begins, counted in characters from the beginning of its own text.
      lengths_W: how many characters each has.
      letters_W: whether it holds a letter.
      offsets_N1: the words of text i are those from offsets_N1[i] up to offsets_N1[i + 1].
    """

    hashes_W: np.ndarray
    starts_W: np.ndarray
    lengths_W: np.ndarray
    letters_W: np.ndarray
    offsets_N1: np.ndarray


def chunks(texts: Sequence[str]) -> Iterator[slice]:
    """Cuts texts into runs of about `CHUNK` characters, and at least one text."""
    start = size = 0
    for i, text in enumerate(texts):
        if size and size + len(text) > CHUNK:
            yield slice(start, i)
            start, size = i, 0
        size += len(text) + 1
    if start < len(texts):
        yield slice(start, len(texts))


def normal_words(texts: Sequence[str]) -> Words:
    """Words as a reader of any script would compare them: lower case, without punctuation.

    A word is a run of letters, digits and marks; letters of scripts without spaces are words each.
    """
    values, classes = _normal_tables()
    return _words(texts, values, classes)


def spaced_words(texts: Sequence[str]) -> Words:
    """Words as `str.split()` gives them: what stands between white space, as it is written."""
    values, classes = _spaced_tables()
    return _words(texts, values, classes)


def normal_characters(texts: Sequence[str]) -> Words:
    """The characters of `normal_words` with one space between words, each as a word of its own."""
    values, classes = _normal_tables()
    codes, bounds = _codes(texts)
    kind = classes[np.minimum(codes, _PLANES)] > 0
    before = np.concatenate([[False], kind[:-1]])
    taken = np.flatnonzero(kind | before)  # the first separator after a word stands for all
    hashes = values[np.where(kind[taken], np.minimum(codes[taken], _PLANES), 0x20)]
    offsets = np.searchsorted(taken, bounds)
    starts = taken - np.repeat(bounds[:-1], np.diff(offsets))
    letters = classes[np.minimum(codes[taken], _PLANES)] & _LETTER > 0
    return Words(mix(hashes), starts, np.ones_like(starts), letters, offsets)


def ngrams(hashes_W: np.ndarray, offsets_N1: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of n words inside each text, and their offsets.

    Returns: (hashes_G, offsets_N1). A text of fewer than n words has none.
    """
    counts = np.maximum(np.diff(offsets_N1) - n + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    total = max(len(hashes_W) - n + 1, 0)
    whole = np.zeros(total, np.uint64)
    factor = np.uint64(1)
    for i in range(n):
        whole += hashes_W[i : i + total] * factor
        factor = _times(factor, PRIME)
    if len(counts) == 1:
        return mix(whole[: counts[0]]), offsets
    return mix(whole[positions(offsets_N1[:-1], counts)]), offsets


def positions(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... (`count` of them) of each range, one after another."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def mix(hashes: np.ndarray) -> np.ndarray:
    """Spreads every bit over all of a uint64: the finaliser of splitmix64 (Steele et al., 2014)."""
    hashes = hashes ^ (hashes >> np.uint64(30))
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes


def _codes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Code points of all texts, each closed by a newline, and where each text begins."""
    joined = "\n".join([*texts, ""])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))
    return codes, np.concatenate([[0], np.cumsum(sizes)])


def _words(texts: Sequence[str], values: np.ndarray, classes: np.ndarray) -> Words:
    codes, bounds = _codes(texts)
    codes = np.minimum(codes, _PLANES)
    kind = classes[codes]
    run, single = kind & _RUN > 0, kind & _ALONE > 0
    # Every text ends in a separator, so that no run crosses into the next.
    first, last = run.copy(), run.copy()
    first[1:] &= ~run[:-1]
    last[:-1] &= ~run[1:]
    starts = np.flatnonzero(first | single)
    ends = np.flatnonzero(last | single) + 1
    powers, inverses = _powers(len(codes))
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(values[codes] * powers[: len(codes)], out=sums[1:])
    hashes = mix((sums[ends] - sums[starts]) * inverses[starts])
    offsets = np.searchsorted(starts, bounds)
    within = starts - np.repeat(bounds[:-1], np.diff(offsets))
    letters = np.zeros(len(codes) + 1, np.int32)
    np.cumsum(kind & _LETTER > 0, out=letters[1:])
    return Words(hashes, within, ends - starts, letters[ends] > letters[starts], offsets)


@functools.lru_cache(maxsize=1)
def _normal_tables() -> tuple[np.ndarray, np.ndarray]:
    """(value, class) of each code point; class 0 separates words."""
    classes = np.zeros(_PLANES + 1, np.uint8)
    lower = np.arange(_PLANES + 1)
    for code in range(_PLANES):
        character = chr(code)
        category = unicodedata.category(character)[0]
        if category in "LNM":
            classes[code] = _RUN | _LETTER if category == "L" else _RUN
            small = character.lower()
            if len(small) == 1:
                lower[code] = ord(small)
    for begin, end in _UNSPACED:
        classes[begin : end + 1] += classes[begin : end + 1] & _RUN  # which makes it _ALONE
    return mix((lower + 1).astype(np.uint64) * PRIME), classes


@functools.lru_cache(maxsize=1)
def _spaced_tables() -> tuple[np.ndarray, np.ndarray]:
    classes = np.full(_PLANES + 1, _RUN, np.uint8)
    for code in range(_PLANES):
        character = chr(code)
        if character.isalpha():
            classes[code] |= _LETTER
        elif character.isspace():
            classes[code] = 0
    # All code points above the tables' share one value: they are private, or unassigned.
    return mix(np.arange(1, _PLANES + 2).astype(np.uint64) * PRIME), classes


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """PRIME^i modulo 2^64 and its inverses, for i < size or more."""
    return _power_table(1 << max(size - 1, CHUNK * 2 - 1).bit_length())


@functools.lru_cache(maxsize=1)
def _power_table(size: int) -> tuple[np.ndarray, np.ndarray]:
    inverse = np.uint64(pow(int(PRIME), -1, 1 << 64))
    return _geometric(PRIME, size), _geometric(inverse, size)


def _geometric(base: np.uint64, size: int) -> np.ndarray:
    out = np.full(size, base, np.uint64)
    out[0] = 1
    return np.cumprod(out, dtype=np.uint64)


def _times(a: np.uint64, b: np.uint64) -> np.uint64:
    """a * b modulo 2^64, of scalars, without numpy's warning of an overflow."""
    return np.uint64(int(a) * int(b) & 0xFFFFFFFFFFFFFFFF)


assert sys.byteorder == "little", "code points are read as little-endian numbers"
