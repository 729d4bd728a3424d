"""Which documents share a row: computed once for a store and a context length, then looked up.

A row is a list of pieces, a piece a run of one document's tokens. Both ways of packing give every
token of every document to exactly one row, and no row holds documents of two sources.

"fit" packs whole documents by best-fit decreasing: from the longest to the shortest, each goes to
the row with the least space left that holds it, or to a new one. Source: Johnson, "Near-optimal bin
packing algorithms", 1973; for language models Ding et al., arXiv:2404.10830. Documents longer than
a row give rows of their own first, and only the rest is packed. "concatenate" sets a source's
documents one after another and cuts them every `length` tokens.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmjax.data.cache import cache_folder, is_sealed, seal_folder, write_atomically
from lmjax.data.remote import is_remote
from lmjax.data.store import Store

# N documents, P pieces, R rows, S sources

Packing = Literal["fit", "concatenate"]
log = logging.getLogger("lmjax")
_VERSION = 1


@dataclass(frozen=True)
class Rows:
    """The rows of a store, in a folder; pickles as the folder's name.

    Rows of a source are consecutive, in the order of the first token of each.
    """

    folder: Path

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopened, not copied, in another process."""
        return Rows, (self.folder,)

    @functools.cached_property
    def begins(self) -> np.ndarray:
        """The number in the store of each piece's first token, int64 [P]."""
        return self._load("begins")

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """How many tokens each piece has, int32 [P]."""
        return self._load("sizes")

    @functools.cached_property
    def goes_on(self) -> np.ndarray:
        """Whether its document has a token after the piece, bool [P]; the piece then ends a row."""
        return self._load("goes_on")

    @functools.cached_property
    def first_pieces(self) -> np.ndarray:
        """Each row's first piece, and P; int64 [R + 1]."""
        return self._load("first_pieces")

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """Each source's first row, and R; int64 [S + 1]."""
        return self._load("first_rows")

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return int(self.first_rows[-1])

    def _load(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))


def pack(store: Store, *, length: int, packing: Packing) -> Rows:
    """The rows of a store, computed where nobody has: beside it if that can be, else in the cache.

    The same for every machine, as only the lengths and sources of documents are used.
    """
    made_of = repr((_VERSION, store.fingerprint, length, packing))
    name = f"rows-{packing}-{length}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    beside = Path(store.path) / name if not is_remote(store.path) else None
    cached = cache_folder() / "rows" / name
    for folder in (beside, cached):
        if folder is not None and is_sealed(folder):
            return Rows(folder)
    folder = beside if beside is not None and os.access(store.path, os.W_OK) else cached
    write_atomically(folder, lambda made: _write(made, store, length, packing))
    rows = Rows(folder)
    log.info(
        "packed %s tokens into %s rows of %s (%s), %.2f %% of them padding",
        store.num_tokens,
        rows.num_rows,
        length,
        packing,
        100 - 100 * store.num_tokens / max(1, rows.num_rows * length),
    )
    return rows


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Packs by best-fit decreasing; items of one size go in their order.

    Exactly what placing one item at a time gives, but all items of a size go into all bins of a
    remaining space at once: a bin that takes an item has the least space of all that still fit.

    Args:
      sizes: integers in [1, capacity], [N].
      capacity: of every bin.

    Returns: the bin of each item, int64 [N], and the number of bins.
    """
    bin_of = np.zeros(len(sizes), np.int64)
    order = np.argsort(sizes.astype(np.uint16 if capacity < 1 << 16 else np.int64), kind="stable")
    values, begins = np.unique(sizes[order], return_index=True)
    ends = np.append(begins, len(sizes))[1:]
    spaces: dict[int, deque[np.ndarray]] = {}  # space left -> runs of bins that have it
    mask, num_bins = 0, 0  # bit s of the mask: there is a bin with the space s
    for size, begin, end in zip(values[::-1].tolist(), begins[::-1], ends[::-1], strict=True):
        items, done = order[begin:end], 0
        while done < len(items):
            rest, fitting = len(items) - done, mask >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                bins = spaces[space].popleft()
                if not spaces[space]:
                    mask ^= 1 << space
            else:
                space = capacity
                bins = np.arange(num_bins, num_bins - (-rest // (capacity // size)))
                num_bins += len(bins)
            each = space // size  # items that such a bin takes one after another
            needed = -(-rest // each)
            if needed < len(bins):
                spaces[space].appendleft(bins[needed:])
                mask |= 1 << space
                bins = bins[:needed]
            count = min(rest, each * len(bins))
            bin_of[items[done : done + count]] = np.repeat(bins, each)[:count]
            done += count
            full, over = divmod(count, each)
            for run, left in (
                (bins[:full], space - each * size),
                (bins[full:], space - over * size),
            ):
                if len(run) and left:
                    spaces.setdefault(left, deque()).append(run)
                    mask |= 1 << left
    return bin_of, num_bins


def _write(folder: Path, store: Store, length: int, packing: Packing) -> None:
    begins, sizes, sources = [], [], []
    for shard, first in enumerate(store.first_tokens[:-1].tolist()):
        starts = store.starts(shard)
        begins.append(starts[:-1] + first)
        sizes.append(np.diff(starts))
        sources.append(store.source_of(shard))
    all_begins, all_sizes, source_of = map(np.concatenate, (begins, sizes, sources))
    cut = _fit if packing == "fit" else _concatenate
    parts, num_pieces, rows = [], 0, [0]
    for source in range(len(store.sources)):
        own = (source_of == source) & (all_sizes > 0)
        begin, size, goes_on, first_piece = cut(all_begins[own], all_sizes[own], length)
        parts.append((begin, size.astype(np.int32), goes_on, first_piece + num_pieces))
        num_pieces += len(begin)
        rows.append(rows[-1] + len(first_piece))
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    joined[3] = np.append(joined[3], num_pieces)
    folder.mkdir()
    for name, array in zip(("begins", "sizes", "goes_on", "first_pieces"), joined, strict=True):
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "first_rows.npy", np.array(rows, np.int64))
    seal_folder(folder)


Cut = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _fit(begins: np.ndarray, sizes: np.ndarray, length: int) -> Cut:
    """(begins, sizes, goes_on) of pieces in the order of rows, and each row's first piece."""
    whole = sizes // length
    document = np.repeat(np.arange(len(sizes)), whole)
    number = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    rest = sizes % length
    left = np.flatnonzero(rest)
    bin_of, num_bins = best_fit(rest[left], length)
    begin = np.concatenate([begins[document] + number * length, (begins + whole * length)[left]])
    size = np.concatenate([np.full(len(document), length, np.int64), rest[left]])
    goes_on = begin + size < np.concatenate([(begins + sizes)[document], (begins + sizes)[left]])
    row = np.concatenate([num_bins + np.arange(len(document)), bin_of])
    by_token = np.argsort(begin, kind="stable")
    begin, size, goes_on, row = (array[by_token] for array in (begin, size, goes_on, row))
    first = np.zeros(num_bins + len(document), np.int64)
    first[row[::-1]] = np.arange(len(row))[
        ::-1
    ]  # of what is set twice the last, so the first piece
    place = np.zeros_like(first)
    place[np.argsort(first, kind="stable")] = np.arange(len(first))
    by_row = np.argsort(place[row], kind="stable")
    counts = np.bincount(place[row], minlength=len(first))
    return begin[by_row], size[by_row], goes_on[by_row], np.cumsum(counts) - counts


def _concatenate(begins: np.ndarray, sizes: np.ndarray, length: int) -> Cut:
    """Likewise."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends - sizes, np.arange(0, total, length))
    size = np.diff(np.append(cuts, total))
    document = np.searchsorted(ends, cuts, side="right")
    begin = begins[document] + cuts - (ends - sizes)[document]
    goes_on = begin + size < (begins + sizes)[document]
    return begin, size, goes_on, np.searchsorted(cuts, np.arange(0, total, length))
