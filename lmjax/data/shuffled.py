"""The rows of a split as a data set: in another order each epoch, or in their own."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np

from lmjax.core import Batch
from lmjax.data.batches import Examples, Indexed, read_batches


class Rows(Examples, Protocol):
    """The rows of a split, by their number from 0."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        ...


class InRows(Indexed, Protocol):
    """A split whose examples are rows; gives what inherits it examples, batches and epochs.

    The training split comes in another order each epoch, every other split in its own.
    """

    path: str
    split: str

    @property
    def _rows(self) -> Rows:
        """Those of this split."""
        ...

    @property
    def num_examples(self) -> int:
        """Rows of this split."""
        return self._rows.num_rows

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often `num_examples` drawn examples have gone through the rows."""
        return {self.path: num_examples / self.num_examples}

    def stacked(self, *, seed: int) -> Shuffled:
        """The endless sequence of examples, many at a time; `seed` orders the training split."""
        return Shuffled(self._rows, seed if self.split == "train" else None)

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Generator[Batch, None, None]:
        """Every row once, in order; rows of zeros complete the last batch."""
        return read_batches(
            self._rows,
            batch_size=batch_size,
            shard=shard,
            num_shards=num_shards,
            num_examples=self.num_examples,
        )


@dataclass(frozen=True)
class Shuffled:
    """The endless sequence of rows: number i belongs to epoch `i // num_rows`.

    Args:
      of: the rows.
      seed: from which, and from the epoch, the order is drawn; None for their own order.
    """

    of: Rows
    seed: int | None

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples of the sequence, stacked."""
        return self.of.rows([self._at(index) for index in examples])

    def _at(self, index: int) -> int:
        epoch, rank = divmod(index, self.of.num_rows)
        if self.seed is None:
            return rank
        last = self.of.num_rows - 1
        return int(grain.experimental.index_shuffle(rank, last, _draw(self.seed, epoch), 4))


@functools.lru_cache(maxsize=64)
def _draw(seed: int, epoch: int) -> int:
    return int(np.random.default_rng((int(seed) % 2**64, epoch)).integers(2**32))
