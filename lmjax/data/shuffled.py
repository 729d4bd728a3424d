"""The examples of a split, in another order each epoch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from lmjax.core import Batch
from lmjax.data.batches import Examples


@dataclass(frozen=True)
class Shuffled:
    """The endless sequence of examples: number i belongs to epoch `i // num_examples`.

    Args:
      examples: those of the split, by their number from 0.
      num_examples: how many there are.
      seed: from which, and from the epoch, the order is drawn; None for their own order.
    """

    examples: Examples
    num_examples: int
    seed: int | None

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples of the sequence, stacked."""
        return self.examples.rows([self._at(index) for index in examples])

    def _at(self, index: int) -> int:
        epoch, rank = divmod(index, self.num_examples)
        if self.seed is None:
            return rank
        last = self.num_examples - 1
        return int(grain.experimental.index_shuffle(rank, last, _draw(self.seed, epoch), 4))


@functools.lru_cache(maxsize=64)
def _draw(seed: int, epoch: int) -> int:
    return int(np.random.default_rng((int(seed) % 2**64, epoch)).integers(2**32))
