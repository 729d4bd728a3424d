"""Which pairs of texts share a row, computed once and read from files."""

# R rows, P pairs

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.core import Batch
from lmjax.data.cache import seal_folder
from lmjax.data.pairs import Pair
from lmjax.data.tokenizer import TextTokenizer

OPEN_ROWS = 256  # among which a pair is put


@dataclass(frozen=True)
class Rows:
    """Pairs in rows, in a folder; pickles as the folder's name.

    `ids` holds the sources one after another and then the targets; `begins` [2, P + 1] where each
    begins in it; pairs are in the order of rows, and `first_pairs` [R + 1] is each row's first.
    """

    folder: Path
    lengths: tuple[int, int]

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopened, not copied, in another process."""
        return Rows, (self.folder, self.lengths)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Token ids as stored."""
        return np.asarray(np.load(self.folder / "ids.npy", mmap_mode="r"))

    @functools.cached_property
    def begins(self) -> np.ndarray:
        """Where in `ids` each source and each target begins, and the last ends."""
        return np.asarray(np.load(self.folder / "begins.npy"))

    @functools.cached_property
    def first_pairs(self) -> np.ndarray:
        """Each row's first pair, and P."""
        return np.asarray(np.load(self.folder / "first_pairs.npy"))

    @functools.cached_property
    def counts(self) -> Mapping[str, int]:
        """What was put into rows, and what was too long."""
        found: dict[str, int] = json.loads((self.folder / "counts.json").read_text())
        return found

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.first_pairs) - 1

    def at(self, row: int) -> Mapping[str, np.ndarray]:
        """The example of a row; `Parallel` says what is in it."""
        first, last = self.first_pairs[row], self.first_pairs[row + 1]
        found = {}
        for side, (names, length) in enumerate(zip(_NAMES, self.lengths, strict=True)):
            begins = self.begins[side, first : last + 1]
            own = np.arange(begins[0], begins[-1])
            pair = np.searchsorted(begins, own, side="right") - 1
            columns = self.ids[begins[0] : begins[-1]], pair + 1, own - begins[pair]
            for name, column in zip(names, columns, strict=True):
                found[name] = np.zeros(length, np.int32)
                found[name][: len(own)] = column
        return found | {"weights": (found["segments"] > 0).astype(np.float32)}

    def rows(self, examples: Sequence[int]) -> Batch:
        """The examples of these rows, stacked."""
        held = [self.at(row) for row in examples]
        return {name: np.stack([example[name] for example in held]) for name in held[0]}


_NAMES = (
    ("source", "source_segments", "source_positions"),
    ("targets", "segments", "positions"),
)


def rows_of(sizes: np.ndarray, lengths: tuple[int, int]) -> list[list[int]]:
    """Puts each item into the open row with the least space left that holds both of its sizes.

    Items come in an order drawn once and for all, so that rows mix short and long ones; a row that
    makes room for a new one among the open rows is the fullest.

    Args:
      sizes: of both sides, [P, 2], each at most its length.

    Returns: the items of each row, rows in the order of their first item, items in their order.
    """
    order = np.random.default_rng(0).permutation(len(sizes))
    space = np.zeros((OPEN_ROWS, 2), np.int64)
    row_at = np.full(OPEN_ROWS, -1)
    rows: list[list[int]] = []
    never = np.iinfo(np.int64).max
    for item in order.tolist():
        left = space - sizes[item]
        left_over = np.where(left.min(axis=1) < 0, never, left.sum(axis=1))
        best = int(left_over.argmin())
        if left_over[best] == never:
            best = int(np.where(row_at < 0, -1, space.sum(axis=1)).argmin())
            space[best], row_at[best] = lengths, len(rows)
            rows.append([])
        space[best] -= sizes[item]
        rows[row_at[best]].append(item)
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


def write_rows(
    folder: Path,
    pairs: Sequence[Pair],
    tokenizer: TextTokenizer,
    lengths: tuple[int, int],
    packing: str,
) -> None:
    """Writes the pairs that fit as `Rows`, several to a row where the packing is "fit".

    Args:
      lengths: tokens of sources and of targets in a row.
    """
    sources = [tokenizer.encode_prompt(pair.source) for pair in pairs]
    targets = [np.append(tokenizer.encode(pair.target), tokenizer.end_id) for pair in pairs]
    sizes = np.array([[len(s), len(t)] for s, t in zip(sources, targets, strict=True)])
    fitting = np.flatnonzero((sizes <= lengths).all(axis=1) & (sizes > 0).all(axis=1))
    if packing == "fit":
        rows = [fitting[row].tolist() for row in rows_of(sizes[fitting], lengths)]
    else:
        rows = [[item] for item in fitting.tolist()]
    order = [item for row in rows for item in row]
    texts = [[side[item] for item in order] for side in (sources, targets)]
    ends = [np.cumsum([0] + [len(text) for text in side]) for side in texts]
    ends[1] += ends[0][-1]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    folder.mkdir()
    ids = np.concatenate([*texts[0], *texts[1]]) if order else np.zeros(0)
    np.save(folder / "ids.npy", ids.astype(dtype))
    np.save(folder / "begins.npy", np.stack(ends))
    np.save(folder / "first_pairs.npy", np.cumsum([0] + [len(row) for row in rows]))
    counts = {
        "pairs": len(order),
        "left out: too long": len(pairs) - len(order),
        "rows": len(rows),
        "source tokens": int(ends[0][-1]),
        "target tokens": int(ends[1][-1] - ends[1][0]),
    }
    (folder / "counts.json").write_text(json.dumps(counts))
    seal_folder(folder)
