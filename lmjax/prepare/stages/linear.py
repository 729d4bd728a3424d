"""A linear classifier of texts by their words: small, fast, and trained here in seconds.

Shape legend: N texts, F features of all texts (hashed words and n-grams), B buckets, K labels.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.stages import words

_BATCH = 16  # texts between two updates


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A labeller (`lmjax.prepare.stages.label`) that `fit` has trained.

    Args:
      path: the .npz file that `fit` wrote.
      positive: the label whose probability is the score; "" for the likeliest's own.
    """

    path: str
    positive: str = ""

    def files(self) -> list[str]:
        """The model's file."""
        return [self.path]

    def predict(self, texts: Sequence[str]) -> tuple[list[str | None], list[float | None]]:
        """The likeliest label of each text, and a probability.

        Raises UserError where the file is missing, or has no label of the name `positive`.
        """
        weights_BK, bias_K, names, ngram = _load(self.path, _changed(self.path))
        if self.positive and self.positive not in names:
            raise UserError(f"positive={self.positive!r}." + did_you_mean(self.positive, names))
        chances = []
        for piece in words.chunks(texts):
            features_F, offsets = _features(texts[piece], ngram, len(weights_BK))
            chances.append(_softmax(_logits(weights_BK, bias_K, features_F, offsets)))
        chances_NK = np.concatenate([np.zeros((0, len(names))), *chances])
        best_N = np.argmax(chances_NK, axis=1)
        column = names.index(self.positive) if self.positive else best_N
        scores_N = chances_NK[np.arange(len(best_N)), column]
        return [names[i] for i in best_N.tolist()], scores_N.tolist()


def fit(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    path: str | Path,
    ngram: int = 2,
    num_buckets: int = 1 << 18,
    epochs: int = 5,
    rate: float = 50.0,
    seed: int = 0,
) -> float:
    """Trains a linear classifier by gradient descent on its cross-entropy, and writes it.

    Source: fastText, Joulin et al., arXiv:1607.01759, sections 2 and 2.2: p = softmax of the mean
    of the features' vectors; words and n-grams are hashed; the rate falls linearly to zero.
    Departure: features have a weight for each label, and no vectors of a lower dimension between.

    Args:
      texts: what to learn from; words as in `words.normal_words`.
      labels: of the texts.
      path: of the .npz file.
      ngram: features are words, and runs of up to so many.
      num_buckets: features are counted in so many; 4 bytes for each and each label.
      epochs: how often each text is seen.
      rate: the step on the gradient of one text, at first; large, as it falls on a mean.
      seed: of the order of texts.

    Returns: the mean cross-entropy in the last epoch, each text's before its update; in nats.
    """
    names = sorted(set(labels))
    if len(names) < 2 or len(texts) != len(labels):
        raise UserError(
            f"{len(texts)} texts have {len(labels)} labels, {len(names)} of them different: give "
            "each text a label, and two labels at least."
        )
    weights_BK = np.zeros((num_buckets, len(names)), np.float32)
    bias_K = np.zeros(len(names), np.float32)
    numbers = {name: k for k, name in enumerate(names)}
    truth_N = np.array([numbers[label] for label in labels])
    found = [_features(texts[piece], ngram, num_buckets) for piece in words.chunks(texts)]
    features_F = np.concatenate([features for features, _ in found])
    sizes_N = np.concatenate([np.diff(offsets) for _, offsets in found])
    starts_N = np.cumsum(sizes_N) - sizes_N
    random, loss, seen = np.random.default_rng(seed), 0.0, 0
    for _ in range(epochs):
        loss = 0.0
        order_N = random.permutation(len(texts))
        for start in range(0, len(texts), _BATCH):
            chosen = order_N[start : start + _BATCH]
            own_F = features_F[words.positions(starts_N[chosen], sizes_N[chosen])]
            offsets = np.concatenate([[0], np.cumsum(sizes_N[chosen])])
            error_NK = _softmax(_logits(weights_BK, bias_K, own_F, offsets))
            rows = np.arange(len(chosen))
            loss -= float(np.log(error_NK[rows, truth_N[chosen]] + 1e-30).sum())
            error_NK[rows, truth_N[chosen]] -= 1
            step = rate * (1 - seen / (epochs * len(texts)))
            share_NK = error_NK / np.maximum(sizes_N[chosen], 1)[:, None]
            np.add.at(weights_BK, own_F, -step * np.repeat(share_NK, sizes_N[chosen], axis=0))
            # as far as one more feature of each text: at the rate of its own gradient it swings
            bias_K -= (step * share_NK.sum(axis=0)).astype(np.float32)
            seen += len(chosen)
    with open(path, "wb") as file:
        np.savez(file, weights=weights_BK, bias=bias_K, names=np.array(names), ngram=ngram)
    return loss / len(texts)


def _features(texts: Sequence[str], ngram: int, num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """(buckets of all features, text by text; where each text's begin)."""
    found = words.normal_words(texts)
    count = len(texts)
    parts, of = [], []
    for n in range(1, ngram + 1):
        hashes, offsets = words.ngrams(found.hashes_W, found.offsets_N1, n)
        parts.append((hashes % np.uint64(num_buckets)).astype(np.int64))
        of.append(np.repeat(np.arange(count), np.diff(offsets)))
    text_F = np.concatenate(of)
    sort = np.argsort(text_F, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(text_F, minlength=count))])
    return np.concatenate(parts)[sort], bounds


def _logits(
    weights_BK: np.ndarray, bias_K: np.ndarray, features_F: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """The mean of each text's features, and the bias; a text without features has the bias."""
    sums = np.zeros((len(features_F) + 1, len(bias_K)))
    np.cumsum(weights_BK[features_F], axis=0, out=sums[1:])
    sizes = np.maximum(np.diff(offsets), 1)[:, None]
    return (sums[offsets[1:]] - sums[offsets[:-1]]) / sizes + bias_K


def _softmax(logits_NK: np.ndarray) -> np.ndarray:
    chances: np.ndarray = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    return chances / chances.sum(axis=1, keepdims=True)


def _changed(path: str) -> int:
    """When the file was last written, so that a new model of the same name is read."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


@functools.lru_cache(maxsize=4)
def _load(path: str, _: int) -> tuple[Any, Any, list[str], int]:
    try:
        with np.load(path, allow_pickle=False) as held:
            names = held["names"].tolist()
            return held["weights"], held["bias"], names, int(held["ngram"])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path!r} holds no model that `linear.fit` wrote: {error}.") from error
