"""Which source gives example number i, and which of its examples that is: a closed formula of i.

In each phase the sources take turns in a fixed pattern of `PERIOD` examples, evenly spread; a phase
ends where a source has gone through all the epochs that it may, and the next has it no more. So a
source has given its share, to within one example, at every moment of a phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmjax.errors import UserError

# S sources, I indices

PERIOD = 1 << 14


@dataclass(frozen=True)
class Phase:
    """A run of examples with the same shares.

    Attributes:
      first: its first example.
      given: what each source has given before, [S].
      pattern: the source of each place in the pattern, [PERIOD].
      earlier: how many earlier places of the pattern are of the same source, [PERIOD].
      counts: how many places each source has, [S].
    """

    first: int
    given: np.ndarray
    pattern: np.ndarray
    earlier: np.ndarray
    counts: np.ndarray

    def given_at(self, index: int) -> np.ndarray:
        """What each source has given before example `index` of this phase, [S]."""
        periods, rest = divmod(index - self.first, PERIOD)
        inside = np.bincount(self.pattern[:rest], minlength=len(self.counts))
        return self.given + periods * self.counts + inside


class Schedule:
    """Sources in proportion to weights, some of them for a number of epochs at most."""

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        caps: Sequence[float],
    ) -> None:
        """Lays out the phases.

        Args:
          sizes: examples in an epoch of each source.
          weights: the share of each in what is drawn; only their ratios matter. 0 leaves it out.
          caps: epochs after which a source is left out; infinity for never.
        """
        self.sizes = np.array(sizes, np.int64)
        limits = [
            math.inf if math.isinf(cap) else max(1, round(size * cap))
            for size, cap in zip(sizes, caps, strict=True)
        ]
        phases: list[Phase] = []
        active = [w > 0 and size > 0 for w, size in zip(weights, sizes, strict=True)]
        first, given = 0, np.zeros(len(sizes), np.int64)
        while any(active):
            shares = [w if on else 0.0 for w, on in zip(weights, active, strict=True)]
            pattern, earlier, counts = _pattern(shares)
            phase = Phase(first, given, pattern, earlier, counts)
            phases.append(phase)
            ends = [
                _place(phase, source, int(limit - given[source]))
                if on and limit < math.inf
                else math.inf
                for source, (on, limit) in enumerate(zip(active, limits, strict=True))
            ]
            end = min((e for e, on in zip(ends, active, strict=True) if on), default=math.inf)
            if end == math.inf:
                first = -1
                break
            first, given = int(end), phase.given_at(int(end))
            active = [on and given[s] < limits[s] for s, on in enumerate(active)]
        self.phases = tuple(phases)
        self.total: int | None = None if first < 0 else first
        self._firsts = np.array([phase.first for phase in phases], np.int64)

    def at(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, its example's number counted over its epochs) of examples, both int64 [I]."""
        if self.total is not None and len(indices) and int(indices.max()) >= self.total:
            raise UserError(
                f"example {int(indices.max())} is asked for, and after {self.total} every source "
                "has been gone through max_epochs times. Train for fewer steps, raise max_epochs, "
                "or give more data."
            )
        source = np.zeros(len(indices), np.int64)
        rank = np.zeros(len(indices), np.int64)
        which = np.searchsorted(self._firsts, indices, side="right") - 1
        for number in np.unique(which).tolist():
            phase, here = self.phases[number], which == number
            periods, place = np.divmod(indices[here] - phase.first, PERIOD)
            own = phase.pattern[place]
            source[here] = own
            rank[here] = phase.given[own] + periods * phase.counts[own] + phase.earlier[place]
        return source, rank

    def given(self, index: int) -> np.ndarray:
        """What each source has given before example `index`, int64 [S]."""
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.phases[number].given_at(index)


def schedule(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    weights: Mapping[str, float],
    max_epochs: Mapping[str, float],
) -> Schedule:
    """The schedule of named sources; a source that `max_epochs` does not name has no limit."""
    return Schedule(
        sizes,
        [float(weights.get(name, 0)) for name in names],
        [float(max_epochs.get(name, math.inf)) for name in names],
    )


def _pattern(shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source of each place, earlier places of it, places by source): evenly spread shares.

    Source s stands at the moments (k + 1/2) / counts[s], in their order.
    """
    whole = sum(shares)
    exact = np.array([share / whole * PERIOD for share in shares])
    counts = np.where(exact > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    by_rest = np.argsort(-(exact - counts), kind="stable").tolist()
    while (short := PERIOD - int(counts.sum())) > 0:
        for source in [s for s in by_rest if exact[s] > 0][:short]:
            counts[source] += 1
    while counts.sum() > PERIOD:  # of tiny shares, which were given one place each
        counts[int(np.argmax(counts))] -= 1
    source = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(PERIOD) - np.repeat(np.cumsum(counts) - counts, counts)
    moment = (number + 0.5) / counts[source]
    order = np.lexsort((source, moment))
    return source[order], number[order], counts


def _place(phase: Phase, source: int, left: int) -> int:
    """The example after which a source has given `left` more in this phase."""
    periods, rest = divmod(left - 1, int(phase.counts[source]))
    place = int(np.flatnonzero((phase.pattern == source) & (phase.earlier == rest))[0])
    return phase.first + periods * PERIOD + place + 1
