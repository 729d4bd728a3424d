"""Training examples as windows over the tokens of a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmjax.data.corpus import Tokens

Packing = Literal["documents", "stream"]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Every window of `length` tokens and their successors, at any start, by random access.

    Shapes: token_bytes [V]. A window costs O(length + log documents).
    """

    tokens: Tokens
    length: int
    packing: Packing
    token_bytes: np.ndarray

    @property
    def num_tokens(self) -> int:
        """How many tokens the split holds."""
        return len(self.tokens.ids)

    def at(self, start: int) -> Mapping[str, np.ndarray]:
        """The example whose first token is number `start`; `Text` says what is in it.

        Where the tokens end before the window does, the rest is padding of weight 0 and segment 0.
        """
        size = self.length
        row = self.tokens.ids[start : start + size + 1].astype(np.int32)
        known = len(row) - 1  # targets that exist
        if known < size:
            row = np.pad(row, (0, size - known))
        weights = np.ones(size, np.float32)
        weights[known:] = 0
        example = {"tokens": row[:-1], "targets": row[1:], "weights": weights}
        if self.packing == "documents":
            starts = self.tokens.starts
            first, last = np.searchsorted(starts, (start, start + size), side="right")
            begins = starts[first:last] - start  # of the later documents: 1..size
            weights[begins - 1] = 0
            segments, positions = _segments(begins, size)
            if known < size:
                segments[known:] = positions[known:] = 0
            example |= {"segments": segments, "positions": positions}
        example["target_bytes"] = self.token_bytes[example["targets"]] * weights
        return example

    def documents(self, start: int) -> Iterator[tuple[int, int, int]]:
        """The documents in `at(start)`: (number, first token, one past the last), of the split.

        Padding belongs to none of them.
        """
        starts, end = self.tokens.starts, min(start + self.length, self.num_tokens - 1)
        first, last = np.searchsorted(starts, (start, end - 1), side="right").tolist()
        for number in range(first - 1, last):
            following = starts[number + 1] if number + 1 < len(starts) else end
            yield number, max(start, int(starts[number])), min(end, int(following))


def _segments(begins: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(segments, positions) of a row whose second, third, ... documents begin at `begins`."""
    positions = np.arange(size, dtype=np.int32)
    if not len(begins):
        return np.ones(size, np.int32), positions
    segments = np.searchsorted(begins, positions, side="right").astype(np.int32)
    origins = np.concatenate([[0], begins]).astype(np.int32)
    return segments + 1, positions - origins[segments]
