"""What data sets and tokenizers honour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from lmjax.core.values import Batch, Spec


class Tokenizer(Protocol):
    """Text to token ids and back, the same for every vocabulary."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text; raises UserError for what the vocabulary cannot spell."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of any sequence of ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def to_json(self) -> str:
        """All that is needed to make it again; saved with every checkpoint."""
        ...


class Dataset(Protocol):
    """Batches as a pure function of (seed, step): of no host, worker, device or restart.

    `batches(...)` yields the global batches `start`, `start + 1`, ... of which this process reads
    the rows of shard `shard` of `num_shards`, in the order of the global batch.
    """

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; needs no data."""
        ...

    def check(self) -> None:
        """Opens the data; raises UserError where it is missing, malformed or too short."""
        ...

    @property
    def fitted(self) -> Mapping[str, str]:
        """What was learned of the training data and belongs to the weights: JSON by its name.

        {"tokenizer": ...} of text, {"columns": ...} of a table; kept with every checkpoint.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Names what batches are made of: another one where any batch would be another."""
        ...

    def batches(
        self, *, batch_size: int, seed: int, shard: int = 0, num_shards: int = 1, start: int = 0
    ) -> Iterator[Batch]:
        """The endless sequence of batches from `start` on."""
        ...

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """Every example once, in order; rows of weight 0 complete the last batch."""
        ...

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often `num_examples` drawn examples have gone through each source, by its name."""
        ...


class TextDataset(Dataset, Protocol):
    """Batches of tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens; may have to be trained on the data first."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many token ids there are; needs no data where the tokenizer's settings say it."""
        ...


class LabelledDataset(Dataset, Protocol):
    """Batches of examples with `labels`: an int32 [] each, or a float32 [C] of zeros and ones.

    Each has `weights` too, a float32 []: 0 for a row that only completes a batch.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels, in the order of their numbers."""
        ...
