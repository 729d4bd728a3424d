"""Text with words masked, for models that predict them from both sides."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import Changed, Indexed, TextSource, check_workers
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import TextTokenizer
from lmjax.data.words import Words, words_of
from lmjax.errors import UserError, did_you_mean

_FIXED = 2**63  # stands for the seed where masks are of no run


@dataclass(frozen=True, kw_only=True)
class Masked(Indexed):
    """Examples of a text in which some tokens are to be predicted; honours `core.TextDataset`.

    Source: Devlin et al. (BERT), arXiv:1810.04805, section 3.1 and appendix A.1; whole words, the
    number of predictions and the words that no longer fit as in its released code,
    create_pretraining_data.py. Departures: rows are the text's own windows, without [CLS], [SEP]
    and next sentences (as RoBERTa, arXiv:1907.11692, section 4.2, has it); a random token is never
    a special one; what is only space is never chosen.

    An example has tokens (int32 [length], masked), targets (int32 [length], as they were), weights
    (float32 [length]: 1 where a token is to be predicted), segments and positions (int32 [length]).

    Of a row with n tokens of text, min(max_predictions, max(1, round(masked_fraction n))) are
    chosen, by whole words in random order, of which those are passed over that would be too many.
    Of the chosen 80 % become the mask, 10 % a random token and 10 % stay, each drawn by itself. All
    is a function of (seed, number of the example); in `epoch_batches` of the number alone.

    Args:
      of: text in rows of segments: `Text` with packing by documents, `Tokens`, a `Mixture`; or
        `LabelledText`, whose labels nobody reads then.
      masked_fraction: of the tokens, how many are predicted.
      max_predictions: at most so many in a row; 0 for no limit.
      unit: "word" masks all tokens of a word or none; "token" each by itself.
      workers: processes that read batches.
    """

    of: TextSource
    masked_fraction: float = 0.15
    max_predictions: int = 0
    unit: Literal["word", "token"] = "word"
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values that cannot work, and text without segments."""
        if not 0 < self.masked_fraction < 1:
            raise UserError(f"masked_fraction is {self.masked_fraction}: give one in (0, 1).")
        if self.max_predictions < 0:
            raise UserError(f"max_predictions is {self.max_predictions}: give 0 or more.")
        if self.unit not in ("word", "token"):
            raise UserError(
                f"unit is {self.unit!r}." + did_you_mean(str(self.unit), ("word", "token"))
            )
        if "segments" not in self.of.example:
            raise UserError(
                "masked text needs segments, which tell padding and documents apart: set "
                "packing='documents' of the text."
            )
        check_workers(self.workers)

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        row = self.of.example["tokens"]
        spec = dict.fromkeys(("tokens", "targets", "segments", "positions"), row)
        return {**spec, "weights": jax.ShapeDtypeStruct(row.shape, np.float32)}

    def check(self) -> None:
        """Opens the text."""
        self.of.check()
        _ = self._masker

    @property
    def tokenizer(self) -> TextTokenizer:
        """What made the tokens; the mask may be an id beyond its own."""
        return self.of.tokenizer

    @property
    def mask_id(self) -> int:
        """The tokenizer's mask_token; one id beyond the vocabulary where it has none."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, SubwordTokenizer):
            own = tokenizer.special_id("mask_token")
            if own is not None:
                return own
        return self.of.vocab_size

    @property
    def vocab_size(self) -> int:
        """How many token ids there are, the mask among them."""
        return max(self.of.vocab_size, self.mask_id + 1)

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer."""
        return self.of.fitted

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of."""
        made_of = (self.of.fingerprint, self.masked_fraction, self.max_predictions, self.unit)
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often `num_examples` drawn examples have gone through the text."""
        return self.of.epochs(num_examples)

    def stacked(self, *, seed: int) -> Changed:
        """The endless sequence of examples: the text's own, masked anew each time."""
        return Changed(examples=self.of.stacked(seed=seed), change=self._masker, seed=seed)

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """The text's own, each example with the same mask every time."""
        split = {"batch_size": batch_size, "shard": shard, "num_shards": num_shards}
        return self.stacked(seed=_FIXED).epoch(self.of.epoch_batches(**split), **split)

    @functools.cached_property
    def _masker(self) -> Masker:
        words = words_of(self.tokenizer)
        return Masker(
            words=words,
            mask_id=self.mask_id,
            drawn=np.flatnonzero(words.choosable).astype(np.int32),
            fraction=self.masked_fraction,
            most=self.max_predictions,
            whole=self.unit == "word",
        )


def validation(of: Masked) -> Masked:
    """The validation split of the same text, with masks that stay.

    Raises UserError where the text has no splits, as a mixture.
    """
    source: Any = of.of
    if not hasattr(source, "split"):
        raise UserError(
            f"{type(source).__name__} holds nothing out: name the evaluation's text itself."
        )
    return replace(of, of=replace(source, split="valid"))


def vocab_size(of: Masked) -> int:
    """How many token ids the data uses, for a model's configuration."""
    return of.vocab_size


@dataclass(frozen=True, kw_only=True)
class Masker:
    """Chooses and hides tokens of one example; see `Masked`.

    Attributes:
      words: what each id says of words.
      mask_id: what the chosen become.
      drawn: the ids of which random ones are drawn.
      fraction: of the tokens, how many are chosen.
      most: at most so many; 0 for no limit.
      whole: whether words are chosen, or tokens.
    """

    words: Words
    mask_id: int
    drawn: np.ndarray
    fraction: float
    most: int
    whole: bool

    def __call__(
        self, seed: int, index: int, example: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The example of this number, masked."""
        random = np.random.default_rng((int(seed) % 2**64, int(index)))
        tokens_T, segments_T = example["tokens"], example["segments"]
        chosen_T = self.choose(tokens_T, segments_T, random)
        fate_T = random.random(len(tokens_T))
        others_T = self.drawn[random.integers(len(self.drawn), size=len(tokens_T))]
        masked_T = np.where(chosen_T & (fate_T < 0.8), np.int32(self.mask_id), tokens_T)
        masked_T = np.where(chosen_T & (fate_T >= 0.9), others_T, masked_T)
        return {
            "tokens": masked_T.astype(np.int32),
            "targets": tokens_T,
            "weights": chosen_T.astype(np.float32),
            "segments": segments_T,
            "positions": example.get("positions", np.arange(len(tokens_T), dtype=np.int32)),
        }

    def choose(
        self, tokens_T: np.ndarray, segments_T: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Which tokens are to be predicted, bool [T]."""
        chosen_T = np.zeros(len(tokens_T), bool)
        real_T = segments_T > 0
        wanted = max(1, round(self.fraction * int(real_T.sum())))
        wanted = min(wanted, self.most) if self.most else wanted
        free = np.flatnonzero(real_T & self.words.choosable[tokens_T])
        numbers = free
        if self.whole:
            numbers = self.words.numbered(tokens_T, segments_T)[free]
        # Words are runs: where each begins among the free tokens, and where the last one ends.
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        ends: Sequence[int] = [*begins[1:].tolist(), len(free)]
        for word in random.permutation(len(begins)).tolist():
            places = free[begins[word] : ends[word]]
            if len(places) <= wanted:
                chosen_T[places] = True
                wanted -= len(places)
            if wanted == 0:
                break
        return chosen_T
