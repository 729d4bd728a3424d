"""Augmentation of text: span corruption, word and token dropout, back-translation by a callable.

Every function is pure in (example, seed, index). T tokens, N spans.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmjax.data.augment.draws import generator
from lmjax.errors import UserError


class Corrupted(NamedTuple):
    """What an encoder reads and what its decoder is to say; int32, of lengths that vary."""

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Replaces spans of tokens by sentinels, and asks for the spans.

    Source: T5, arXiv:1910.10683, section 3.1.4 and its `random_spans_noise_mask`: round(T rate)
    tokens, at least one and at most T - 1, are noise, in round(noise / mean_span) spans, whose
    lengths and gaps are uniform among all with those sums; a gap comes first. Inputs are the tokens
    with each span as one sentinel; targets are each sentinel and its span. Both end with `end_id`.
    Departure: T5 draws both from a stateful generator, here they are drawn from (seed, index).

    Args:
      sentinels: ids of sentinels in the order of spans: T5's are the last ids, from the highest.
      end_id: what ends inputs and targets.
      rate: the share of tokens that is noise.
      mean_span: tokens in a span, on average.
    """

    sentinels: Sequence[int]
    end_id: int
    rate: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        """Refuses values that cannot work."""
        if not 0 < self.rate < 1 or not self.mean_span >= 1:
            raise UserError(
                f"rate is {self.rate}, mean_span {self.mean_span}: give a rate in (0, 1) and spans "
                "of at least 1 token."
            )

    def __call__(self, tokens: np.ndarray, *, seed: int, index: int) -> Corrupted:
        """Corrupts the tokens of example `index`, int [T], its end left out; T is at least 2."""
        spans = self.spans(len(tokens), seed=seed, index=index)
        if len(spans) > len(self.sentinels):
            raise UserError(
                f"{len(tokens)} tokens give {len(spans)} spans, and there are "
                f"{len(self.sentinels)} sentinels: cut the example, or lower rate."
            )
        inputs: list[np.ndarray | list[int]] = []
        targets: list[np.ndarray | list[int]] = []
        before = 0
        for sentinel, (begin, end) in zip(self.sentinels, spans.tolist(), strict=False):
            inputs += [tokens[before:begin], [sentinel]]
            targets += [[sentinel], tokens[begin:end]]
            before = end
        inputs += [tokens[before:], [self.end_id]]
        targets += [[self.end_id]]
        return Corrupted(_joined(inputs), _joined(targets))

    def spans(self, length: int, *, seed: int, index: int) -> np.ndarray:
        """(first, one past the last) of each span in so many tokens; int64 [N, 2]."""
        if length < 2:
            raise UserError(f"{length} tokens cannot be corrupted: give at least 2.")
        random = generator(seed, index, name="span corruption")
        noise, count = self.sizes(length)
        sizes = _segments(noise, count, random)
        ends = np.cumsum(_segments(length - noise, count, random) + sizes)
        return np.stack([ends - sizes, ends], axis=1)

    def sizes(self, length: int) -> tuple[int, int]:
        """(tokens that are noise, spans) of so many tokens."""
        noise = min(max(round(length * self.rate), 1), length - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, length - noise)


@dataclass(frozen=True, kw_only=True)
class WordDropout:
    """Leaves out each word, with the space before it, with a probability; never all of them.

    Source: Iyyer et al., "Deep unordered composition rivals syntactic methods", 2015, section 3.
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        """Refuses a rate that is none."""
        if not 0 <= self.rate < 1:
            raise UserError(f"rate is {self.rate}: give one in [0, 1).")

    def __call__(self, text: str, *, seed: int, index: int) -> str:
        """The text of example `index` with words left out."""
        words = re.findall(r"\s*\S+|\s+\Z", text)
        random = generator(seed, index, name="word dropout")
        kept = random.random(len(words)) >= self.rate
        if words and not kept.any():
            kept[random.integers(len(words))] = True
        return "".join(word for word, keep in zip(words, kept.tolist(), strict=True) if keep)


@dataclass(frozen=True, kw_only=True)
class TokenDropout:
    """Replaces each token that a model reads by one id, with a probability; not what it predicts.

    Source: Bowman et al., arXiv:1511.06349, section 3.1, word dropout of a decoder's inputs.

    Args:
      id: of the unknown token, or of a mask.
      rate: the probability.
      keep: ids that stay: a document's end, padding.
    """

    id: int
    rate: float = 0.1
    keep: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Refuses a rate that is none."""
        if not 0 <= self.rate <= 1:
            raise UserError(f"rate is {self.rate}: give one in [0, 1].")

    def __call__(self, tokens: np.ndarray, *, seed: int, index: int) -> np.ndarray:
        """The tokens of example `index`, int [T], some of them replaced."""
        drop = generator(seed, index, name="token dropout").random(len(tokens)) < self.rate
        kept = np.isin(tokens, np.asarray(self.keep, tokens.dtype))
        return np.where(drop & ~kept, np.asarray(self.id, tokens.dtype), tokens)


@dataclass(frozen=True, kw_only=True)
class BackTranslation:
    """Replaces a share of texts by what they become there and back.

    Source: Sennrich et al., arXiv:1511.06709; as paraphrase Edunov et al., arXiv:1808.09381. A hook
    and no translator: a config records any callable from text to text,
    `call(BackTranslation, forward=ref(my.translate_to_german), back=ref(my.translate_to_english))`,
    among them `LanguageModel`s that lmjax trained on a translate task. To be run once, as a stage
    over a corpus, rather than in the feed of a run.

    Args:
      forward: to the other language.
      back: and back.
      rate: the share of texts that are translated.
    """

    forward: Callable[[str], str]
    back: Callable[[str], str]
    rate: float = 1.0

    def __call__(self, text: str, *, seed: int, index: int) -> str:
        """The text of example `index`, paraphrased or as it is."""
        if generator(seed, index, name="back-translation").random() >= self.rate:
            return text
        return self.back(self.forward(text))


def _segments(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """A uniform choice among all ways to write `total` as `count` positive numbers in order."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _joined(parts: Sequence[np.ndarray | list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
