"""Translation by a trained run, as prepared data and commands use it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmjax.core import EncoderDecoder
from lmjax.errors import UserError
from lmjax.generate.language_model import LanguageModel, load

_SENTENCES = re.compile(r"(?<=[.!?;:\u3002\uff01\uff1f\uff1b])\s+")
_WORDS = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class Translator:
    """A run that translates; picklable, and its weights are read once in a process.

    Greedy, or with `num_beams` a search, it is a function of the text alone; with a temperature of
    (text, seed).

    Args:
      workdir: of a run whose model reads sources.
      step: which checkpoint; the newest if not given.
      average: take the mean of the parameters of so many newest checkpoints up to that step, as
        Vaswani et al., arXiv:1706.03762, section 6.1.
      num_beams: 1 takes the likeliest token each time.
      length_penalty: of the search, see `beam.BeamSearch`.
      temperature: of a drawn translation; 0 draws nothing.
      max_tokens: the longest translation; the model's longest where not given.
      batch_size: texts that are translated together.
    """

    workdir: str
    step: int | None = None
    average: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    max_tokens: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.batch_size < 1 or self.average < 1:
            raise UserError(
                f"num_beams is {self.num_beams}, batch_size {self.batch_size} and average "
                f"{self.average}: give at least 1 of each."
            )
        if self.num_beams > 1 and self.temperature:
            raise UserError("a search draws nothing: leave out temperature, or num_beams.")

    def __call__(self, text: str) -> str:
        """The translation of a text."""
        return self.translate([text])[0]

    @property
    def model(self) -> LanguageModel:
        """The run's model; raises UserError where it reads no source."""
        return _model(self.workdir, self.step, self.average)

    def translate(self, texts: Sequence[str], *, seeds: Sequence[int] | None = None) -> list[str]:
        """The translation of each text; of an empty one an empty one.

        A text longer than the model reads is translated piece by piece, cut between sentences or
        else words.

        Args:
          seeds: of what is drawn, one for each text; 0 where not given.
        """
        cut = [self._pieces(text) for text in texts]
        pieces = [(number, piece) for number, some in enumerate(cut) for piece in some]
        made = [""] * len(pieces)
        for batch in in_batches([len(piece) for _, piece in pieces], self.batch_size):
            own = None if seeds is None else [seeds[pieces[n][0]] for n in batch]
            some = self._some([pieces[n][1] for n in batch], own)
            for number, text in zip(batch, some, strict=True):
                made[number] = text
        ends = iter(made)
        return [" ".join(next(ends) for _ in some) for some in cut]

    def _pieces(self, text: str) -> list[str]:
        """Parts of the text that the model can read, none empty."""
        text = text.strip()
        room = self.model.model.max_length
        if not text:
            return []
        if len(self.model.encode(text)) <= room:
            return [text]
        for between in (_SENTENCES, _WORDS):
            parts = between.split(text)
            if len(parts) > 1:
                half = len(parts) // 2
                halves = (" ".join(parts[:half]), " ".join(parts[half:]))
                return [piece for one in halves for piece in self._pieces(one)]
        half = len(text) // 2  # one word alone
        return [*self._pieces(text[:half]), *self._pieces(text[half:])]

    def _some(self, texts: list[str], seeds: list[int] | None) -> list[str]:
        model = self.model
        longest = model.model.max_length if self.max_tokens is None else self.max_tokens
        if self.num_beams == 1:
            return model.generate_batch(
                texts,
                max_tokens=longest,
                seed=0 if seeds is None else seeds,
                temperature=self.temperature,
                top_k=0,
            )
        searched = [
            model.search(
                text,
                num_beams=self.num_beams,
                max_tokens=longest,
                length_penalty=self.length_penalty,
            )
            for text in texts
        ]
        return [found[0][0] if found else "" for found in searched]


def in_batches(sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """The numbers of texts in batches of like sizes, so that little of a batch is padding."""
    order = np.argsort(sizes, kind="stable").tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@functools.lru_cache(maxsize=2)
def _model(workdir: str, step: int | None, average: int) -> LanguageModel:
    model = load(workdir, step=step, average=average)
    if not isinstance(model.model, EncoderDecoder):
        raise UserError(
            f"the run of {workdir} continues texts and translates none: name one of an "
            "encoder-decoder, as configs/translate.py makes."
        )
    return model
