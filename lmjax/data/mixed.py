"""Mixed examples many at a time: each source reads its own rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from lmjax.core import Batch
from lmjax.data.batches import Examples


@dataclass(frozen=True, kw_only=True)
class MixedExamples:
    """What a mixture holds, in its order, of the sources' own.

    Attributes:
      turns: (source, the number of its example) of each example of the mixture.
      sources: in the order of the mixture.
      leave_out: arrays that some of them have, and the mixture has not.
    """

    turns: grain.MapDataset[Any]
    sources: tuple[Examples, ...]
    leave_out: tuple[str, ...] = ()

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples, stacked."""
        turns = np.array([self.turns[index] for index in examples], np.int64).reshape(-1, 2)
        batch: dict[str, np.ndarray] = {}
        for source in np.unique(turns[:, 0]).tolist():
            places = np.flatnonzero(turns[:, 0] == source)
            read = dict(self.sources[source].rows(turns[places, 1].tolist()))
            for name in self.leave_out:
                read.pop(name, None)
            if len(places) == len(turns):
                return read
            for name, value in read.items():
                if name not in batch:
                    batch[name] = np.empty((len(turns), *value.shape[1:]), value.dtype)
                batch[name][places] = value
        return batch


@dataclass(frozen=True)
class Turn:
    """Pairs the number of an example with its source; a class, as workers pickle it."""

    source: int

    def __call__(self, index: int) -> tuple[int, int]:
        """(source, index)."""
        return self.source, index
