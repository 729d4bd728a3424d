"""A dictionary of words, learned from pairs of texts: the baseline of a translation."""

# N pairs of words that stand in one pair of texts, C different ones

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
LONGEST = 60  # words of a text that are looked at


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """The likeliest translation of each word."""

    words: Mapping[str, str]

    def translate(self, text: str) -> str:
        """Each word by its own; one that is not known stays, and so does all between words."""
        return _WORD.sub(lambda found: self._one(found[0]), text)

    def _one(self, word: str) -> str:
        return self.words.get(word) or self.words.get(word.lower()) or word


def learn_dictionary(pairs: Iterable[tuple[str, str]], *, iterations: int = 5) -> Dictionary:
    """For each source word the target word that it is most often aligned with, by IBM model 1.

    Source: Brown et al., "The Mathematics of Statistical Machine Translation", Computational
    Linguistics 19 (1993), section 4.2: every source word comes of one target word of its pair, or
    of a NULL word, and expectation maximisation fits p(source word | target word).
    """
    sources, targets = _Numbers(), _Numbers()
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    slots = 0  # source words so far, a repeated one counted again
    for source, target in pairs:
        s = sources.of(_WORD.findall(source)[:LONGEST])
        t = targets.of(["", *_WORD.findall(target)[:LONGEST]])
        slot = np.arange(slots, slots + len(s))
        found.append((np.repeat(s, len(t)), np.tile(t, len(s)), np.repeat(slot, len(t))))
        slots += len(s)
    if not slots:
        return Dictionary(words={})
    s_N, t_N, slot_N = (np.concatenate(column) for column in zip(*found, strict=True))
    num_targets = len(targets.known)
    keys_C, cell_N = np.unique(s_N * num_targets + t_N, return_inverse=True)
    s_C, t_C = keys_C // num_targets, keys_C % num_targets
    p_C: np.ndarray = np.ones(len(keys_C))
    expected_C = p_C
    for _ in range(iterations):
        p_N = p_C[cell_N]
        p_N /= np.bincount(slot_N, weights=p_N)[slot_N]
        expected_C = np.bincount(cell_N, weights=p_N)
        p_C = expected_C / np.bincount(t_C, weights=expected_C)[t_C]
    order = np.argsort(expected_C, kind="stable")
    order = order[t_C[order] > 0]  # number 0 is NULL
    best = dict(zip(s_C[order].tolist(), t_C[order].tolist(), strict=True))  # the last one stays
    names = list(sources.known), list(targets.known)
    return Dictionary(words={names[0][s]: names[1][t] for s, t in best.items()})


class _Numbers:
    """Words by number, in the order in which they come."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def of(self, words: Sequence[str]) -> np.ndarray:
        return np.array([self.known.setdefault(w, len(self.known)) for w in words], np.int64)
