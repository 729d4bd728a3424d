"""BLEU of a corpus of translations, as sacreBLEU computes it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lmjax.errors import UserError

ORDERS = 4
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"
_STEPS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_CHARACTERS = re.compile(r"([\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef])")


@dataclass(frozen=True, kw_only=True)
class Bleu:
    """A score from 0 to 100, and what it is made of.

    Args:
      score: brevity times the geometric mean of the precisions.
      precisions: of 1- to 4-grams, in percent.
      brevity: what short translations are punished by, 1 for those that are long enough.
      ratio: tokens of the translations to tokens of the references.
    """

    score: float
    precisions: tuple[float, ...]
    brevity: float
    ratio: float

    def __str__(self) -> str:
        """As sacreBLEU prints it."""
        parts = "/".join(f"{p:.1f}" for p in self.precisions)
        return f"{self.score:.2f} {parts} (BP = {self.brevity:.3f} ratio = {self.ratio:.3f})"


def corpus_bleu(
    translations: Sequence[str], references: Sequence[str], *, by_character: bool = False
) -> Bleu:
    """BLEU of all translations together, against one reference each.

    Source: Papineni et al., "BLEU", ACL 2002, with the tokenizer `13a` and the exponential
    smoothing of Post, arXiv:1804.08771, whose `sacrebleu.corpus_bleu` gives the same number.

    Args:
      by_character: each Chinese or Japanese character is a token of its own, as those of Chinese
        are in sacreBLEU's tokenizer `zh`.

    Raises UserError for unequal numbers of them.
    """
    if len(translations) != len(references):
        raise UserError(
            f"{len(translations)} translations for {len(references)} references: give one each."
        )
    correct, total = [0] * ORDERS, [0] * ORDERS
    sizes = [0, 0]
    for texts in zip(translations, references, strict=True):
        ours, theirs = (tokens_of(text, by_character=by_character) for text in texts)
        sizes[0] += len(ours)
        sizes[1] += len(theirs)
        for order in range(ORDERS):
            found, wanted = _grams(ours, order + 1), _grams(theirs, order + 1)
            correct[order] += (found & wanted).total()
            total[order] += found.total()
    brevity = 1.0
    if sizes[0] < sizes[1]:
        brevity = math.exp(1 - sizes[1] / sizes[0]) if sizes[0] else 0.0
    precisions, smooth = [0.0] * ORDERS, 1.0
    for order in range(ORDERS if any(correct) else 0):
        if not total[order]:
            break
        if correct[order]:
            precisions[order] = 100 * correct[order] / total[order]
        else:
            smooth *= 2
            precisions[order] = 100 / (smooth * total[order])
    score = 0.0
    if all(precisions):
        score = brevity * math.exp(sum(map(math.log, precisions)) / ORDERS)
    return Bleu(
        score=score,
        precisions=tuple(precisions),
        brevity=brevity,
        ratio=sizes[0] / sizes[1] if sizes[1] else 0.0,
    )


def tokens_of(text: str, *, by_character: bool = False) -> list[str]:
    """The tokens of a text by the rules of mteval-v13a, which WMT uses."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    if by_character:
        text = _CHARACTERS.sub(r" \1 ", text.strip())
    text = f" {text} "
    for pattern, replacement in _STEPS:
        text = pattern.sub(replacement, text)
    return text.split()


def _grams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
