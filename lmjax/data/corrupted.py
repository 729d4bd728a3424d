"""Text with spans left out, for encoder-decoders that say them."""

# L length of the text, M of the source, T of the targets

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data import text
from lmjax.data.augment.text import SpanCorruption
from lmjax.data.batches import Changed, Indexed, TextSource, check_workers
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError

_FIXED = 2**63  # stands for the seed where spans are of no run


@dataclass(frozen=True, kw_only=True)
class Corrupted(Indexed):
    """Examples of a text of which spans are to be said; honours `core.TextDataset`.

    Source: T5, arXiv:1910.10683, section 3.1.4; see `SpanCorruption`. As there, the documents of a
    row are one text: give it packing="stream", or documents that are concatenated.

    An example has `source`, `source_segments` and `source_positions` (int32 [M]): the row with each
    span as one sentinel, and the document's end; and `targets`, `segments` and `positions` (int32
    [T]) with `weights` (float32 [T]): each sentinel and its span, and the end. Segments are 1, and
    0 for what pads the row. M and T follow from the text's length: 116 and 26 of 128, with 6 spans.
    All is a function of (seed, number of the example); in `epoch_batches` of the number alone.

    Args:
      of: the text.
      rate: the share of tokens that is left out.
      mean_span: tokens in a span, on average.
      num_sentinels: how many there are, where the tokenizer has none (T5's "<extra_id_0>" and the
        following): they are then ids beyond its vocabulary, the first the highest.
      workers: processes that read batches.
    """

    of: TextSource
    rate: float = 0.15
    mean_span: float = 3.0
    num_sentinels: int = 100
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values that cannot work."""
        check_workers(self.workers)
        if self._length < 2:
            raise UserError(f"the text's length is {self._length}: give at least 2 tokens.")
        if self.num_sentinels < (needed := self._sizes.sizes(self._length)[1]):
            raise UserError(
                f"num_sentinels is {self.num_sentinels}, and rows of {self._length} tokens have "
                f"{needed} spans: give more, or lower rate or length."
            )

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        noise, count = self._sizes.sizes(self._length)
        source = jax.ShapeDtypeStruct((self._length - noise + count + 1,), np.int32)
        targets = jax.ShapeDtypeStruct((noise + count + 1,), np.int32)
        return {
            **dict.fromkeys(("source", "source_segments", "source_positions"), source),
            **dict.fromkeys(("targets", "segments", "positions"), targets),
            "weights": jax.ShapeDtypeStruct(targets.shape, np.float32),
        }

    def check(self) -> None:
        """Opens the text."""
        self.of.check()
        _ = self._corrupter

    @property
    def tokenizer(self) -> TextTokenizer:
        """What made the tokens; sentinels may be ids beyond its own."""
        return self.of.tokenizer

    @functools.cached_property
    def sentinels(self) -> Sequence[int]:
        """The ids of sentinels, in the order of spans."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, SubwordTokenizer):
            own = [tokenizer.token_id(f"<extra_id_{i}>") for i in range(self.num_sentinels)]
            if found := [i for i in own if i is not None]:
                return found
        return range(self.of.vocab_size + self.num_sentinels - 1, self.of.vocab_size - 1, -1)

    @property
    def vocab_size(self) -> int:
        """How many token ids there are, the sentinels among them."""
        return max(self.of.vocab_size, max(self.sentinels) + 1)

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer."""
        return self.of.fitted

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of."""
        made_of = (self.of.fingerprint, self.rate, self.mean_span, tuple(self.sentinels))
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often `num_examples` drawn examples have gone through the text."""
        return self.of.epochs(num_examples)

    def stacked(self, *, seed: int) -> Changed:
        """The endless sequence of examples: the text's own, corrupted anew each time."""
        return Changed(examples=self.of.stacked(seed=seed), change=self._corrupter, seed=seed)

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """The text's own, each example with the same spans every time."""
        split = {"batch_size": batch_size, "shard": shard, "num_shards": num_shards}
        return self.stacked(seed=_FIXED).epoch(self.of.epoch_batches(**split), **split)

    @property
    def _length(self) -> int:
        return int(self.of.example["tokens"].shape[0])

    @property
    def _sizes(self) -> SpanCorruption:
        return SpanCorruption(sentinels=(), end_id=0, rate=self.rate, mean_span=self.mean_span)

    @functools.cached_property
    def _corrupter(self) -> Corrupter:
        spans = replace(
            self._sizes, sentinels=tuple(self.sentinels), end_id=int(self.tokenizer.end_id)
        )
        return Corrupter(
            spans=spans,
            source_length=self.example["source"].shape[0],
            length=self.example["targets"].shape[0],
        )


def validation(of: Corrupted) -> Corrupted:
    """The validation split of the same text, if it is a `Text`, with spans that stay."""
    assert isinstance(of.of, text.Text)
    return replace(of, of=text.validation(of.of))


def vocab_size(of: Corrupted) -> int:
    """How many token ids the data uses, for a model's configuration."""
    return of.vocab_size


@dataclass(frozen=True, kw_only=True)
class Corrupter:
    """Corrupts one example; see `Corrupted`.

    Attributes:
      spans: draws and hides the spans.
      source_length: M.
      length: T.
    """

    spans: SpanCorruption
    source_length: int
    length: int

    def __call__(
        self, seed: int, index: int, example: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The example of this number, corrupted; a row of less than two tokens becomes padding."""
        real_L = example["segments"] if "segments" in example else example["weights"]
        tokens = example["tokens"][real_L > 0]
        source = targets = np.zeros(0, np.int32)
        if len(tokens) > 1:
            source, targets = self.spans(tokens, seed=seed, index=index)
        return {
            **_padded("source", "source_segments", "source_positions", source, self.source_length),
            **_padded("targets", "segments", "positions", targets, self.length),
            "weights": (np.arange(self.length) < len(targets)).astype(np.float32),
        }


def _padded(
    ids: str, segments: str, positions: str, row: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """The arrays of these names: the row up to `size`, which of it is no padding, and where."""
    places = np.arange(size, dtype=np.int32)
    real = (places < len(row)).astype(np.int32)
    return {ids: np.pad(row, (0, size - len(row))), segments: real, positions: places * real}
