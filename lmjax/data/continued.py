"""Text in the order that carries a state: each row of a batch goes on where it ended before."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lmjax.data.windows import Windows
from lmjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Continued:
    """Windows in the order of truncated backpropagation through time.

    In an epoch the text is cut into `batch_size` equal parts, which the rows of a batch read side
    by side, window after window. Where the parts begin is drawn from (seed, epoch), so that other
    epochs leave out other tokens: fewer than `batch_size` windows of them.

    Args:
      restart_every: after so many windows a row begins anew, each row at a step of its own; 0 for
        never. A model that never does learns to predict from states that have come a long way, and
        is lost where it starts from none, as evaluations and prompts do.
    """

    windows: Windows
    batch_size: int
    seed: int
    restart_every: int = 0

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return (self.windows.num_tokens - 1) // (self.batch_size * self.windows.length)

    def start(self, index: int) -> int:
        """The first token of training example `index`, which is in row `index % batch_size`."""
        step, row = divmod(index, self.batch_size)
        epoch, place = divmod(step, self.steps)
        size = self.windows.length
        spare = self.windows.num_tokens - 1 - self.steps * self.batch_size * size
        return _offset(self.seed, epoch, spare + 1) + (row * self.steps + place) * size

    def at(self, index: int) -> Mapping[str, np.ndarray]:
        """Example `index`; `continues` is 1 where it goes on with the document of its row.

        It is 0 at the beginning of an epoch, where the row begins anew and, where documents are
        kept apart, at the beginning of one.
        """
        start = self.start(index)
        step, row = divmod(index, self.batch_size)
        goes_on = step % self.steps > 0
        if self.restart_every:
            goes_on &= (step + row) % self.restart_every > 0
        if self.windows.packing == "documents":
            starts = self.windows.tokens.starts
            here = int(np.searchsorted(starts, start))
            goes_on &= not (here < len(starts) and starts[here] == start)
        return {**self.windows.at(start), "continues": np.asarray(goes_on, np.int32)}

    def check(self) -> None:
        """Raises UserError where there is not a window for each row."""
        if not self.steps:
            windows = (self.windows.num_tokens - 1) // self.windows.length
            raise UserError(
                f"the text has {windows} windows of {self.windows.length} tokens, and in the order "
                f'"continued" each of the {self.batch_size} rows of a batch reads a part of its '
                "own: lower batch_size or length, or give more text."
            )


def beginning(windows: Windows, start: int) -> Mapping[str, np.ndarray]:
    """The window at `start` as one that goes on from nothing."""
    return {**windows.at(start), "continues": np.zeros((), np.int32)}


@functools.lru_cache(maxsize=64)
def _offset(seed: int, epoch: int, limit: int) -> int:
    """Uniform in [0, limit)."""
    return int(np.random.default_rng((int(seed) % 2**64, epoch)).integers(limit))
