"""Where the tensors of other libraries lie in the arrays of ours: one table, read both ways.

Ours are stacked over layers (and experts), theirs are one a layer. So an array is written cell by
cell: a cell is what one layer, or one expert of it, holds. No more than one cell, or a block of
rows of a table, is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

BLOCK_BYTES = 2**24  # of a tensor's rows, read or written at once
ROWS_BYTES = 2**22  # of them, where they are laid out anew beside a layer in memory
STRIP = 16  # elements

Ranges = tuple[tuple[int, int], ...]


class Tensor(Protocol):
    """A named array of a file, read by rows of its first axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what `rows` gives."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, [stop - start, ...]; raises UserError where they cannot be read."""
        ...


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit; a block of each is in memory at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows = one.shape[0] if one.shape else 1
    step = max(1, BLOCK_BYTES // max(1, 4 * math.prod(one.shape[1:])))
    cuts = ((start, min(rows, start + step)) for start in range(0, rows, step))
    bits = ([t.rows(*cut).reshape(-1).view(np.uint8) for t in (one, other)] for cut in cuts)
    return all(bool(np.array_equal(x, y)) for x, y in bits)


@dataclass(frozen=True)
class Part:
    """`ours[path][where] == theirs[tensor].reshape(split).transpose(axes)`, up to axes of size 1.

    Args:
      tensor: its name in their files.
      shape: its shape there.
      path: of our parameter, as 'blocks/block/mlp/up/kernel'.
      where: (start, stop) along each of our axes.
      split: a refinement of `shape`; axes of size 1 may be added.
      axes: the order of `split`'s axes in ours; several of them may make up one of ours.
    """

    tensor: str
    shape: tuple[int, ...]
    path: str
    where: Ranges
    split: tuple[int, ...]
    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = math.prod(self.shape), math.prod(self.split), math.prod(self.extent)
        assert len(set(sizes)) == 1, f"{self.tensor}: {self.shape}, {self.split}, {self.where}"
        assert sorted(self.axes) == list(range(len(self.split)))

    @property
    def extent(self) -> tuple[int, ...]:
        """The shape of `ours[where]`."""
        return tuple(stop - start for start, stop in self.where)

    @property
    def straight(self) -> bool:
        """Whether the elements lie in ours in the order of theirs."""
        order = [a for a in self.axes if self.split[a] > 1]
        return order == sorted(order)

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """`ours[where]`, given as that region, as a view of the shape `split`."""
        return ours.reshape([self.split[a] for a in self.axes], copy=False).transpose(
            np.argsort(self.axes)
        )

    def copy(self, to: np.ndarray, of: np.ndarray) -> None:
        """Copies what has the axes of `split`, in strips: five times as fast for a transposition.

        The strips are along the axis that is contiguous in ours, a cache line wide.
        """
        axis = self.axes[-1]
        if self.straight:
            to[...] = of
            return
        for start in range(0, to.shape[axis], STRIP):
            strip = (*(slice(None),) * axis, slice(start, start + STRIP))
            to[strip] = of[strip]

    def cuts(self, itemsize: int) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """Blocks of rows of the tensor: (start, stop, what of `theirs()` they are)."""
        axis = next((i for i, n in enumerate(self.split) if n > 1), 0)
        size = self.split[axis]
        if not self.shape or self.shape[0] % size:
            yield 0, self.shape[0] if self.shape else 1, (slice(None),) * len(self.split)
            return
        rows = self.shape[0] // size  # behind one index of that axis
        row_bytes = itemsize * math.prod(self.shape[1:]) * rows
        step = max(1, ROWS_BYTES // max(1, row_bytes))
        for start in range(0, size, step):
            stop = min(size, start + step)
            yield start * rows, stop * rows, (*(slice(None),) * axis, slice(start, stop))


def part(
    tensor: str,
    path: str,
    shape: Sequence[int],
    *,
    at: Sequence[int] = (),
    split: Sequence[int] = (),
    axes: Sequence[int] = (),
    where: Sequence[tuple[int, int]] = (),
) -> Part:
    """A part of the array's cell `at`, its layer (and expert): the whole of it without `where`.

    `split` and `axes` are those of the tensor, `where` of the cell.
    """
    split = tuple(split) or tuple(shape)
    order = tuple(axes) or tuple(range(len(split)))
    extent = tuple(where) or tuple((0, split[a]) for a in order)
    return Part(
        tensor,
        tuple(shape),
        path,
        (*((i, i + 1) for i in at), *extent),
        (*(1,) * len(at), *split),
        (*range(len(at)), *(len(at) + a for a in order)),
    )


def cells(parts: Sequence[Part]) -> dict[tuple[int, ...], list[Part]]:
    """The parts of one array by the layer (and expert) that they make up."""
    depth = 0
    rank = len(parts[0].where)
    while depth < rank - 1 and all(p.extent[depth] == 1 for p in parts):
        depth += 1
    found: dict[tuple[int, ...], list[Part]] = {}
    for p in parts:
        found.setdefault(tuple(start for start, _ in p.where[:depth]), []).append(p)
    return found


def blocks(
    shape: Sequence[int],
    dtype: np.dtype[Any],
    parts: Sequence[Part],
    tensors: Mapping[str, Tensor],
    *,
    needed: Callable[[Sequence[int], Sequence[int]], bool] = lambda start, shape: True,
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """An array of ours, block by block: (where it begins, block); what no part fills is 0.

    Of two blocks one is in memory, where the reader lets go of it before it asks for the next.
    `needed` is asked with (start, shape) of a block before it is read.
    """
    layers = cells(parts)
    depth = len(next(iter(layers)))
    size, lead = tuple(shape[depth:]), (1,) * depth
    row_bytes = dtype.itemsize * math.prod(size[1:])
    together = max(1, BLOCK_BYTES // max(1, row_bytes * size[0])) if depth else 1
    for run in _runs(sorted(layers), together):
        at, members = run[0], layers[run[0]]
        if len(run) == 1 and _by_rows(members, depth, size):
            (p,) = members
            step = max(1, BLOCK_BYTES // max(1, row_bytes))
            for start in range(0, size[0], step):
                stop = min(size[0], start + step)
                begin = (*at, start, *(0,) * (len(size) - 1))
                extent = (*lead, stop - start, *size[1:])
                if not needed(begin, extent):
                    continue
                block = np.zeros(extent, dtype)
                if start < (end := min(stop, p.shape[0])):
                    rows = tensors[p.tensor].rows(start, end).reshape(end - start, *size[1:])
                    block.reshape(stop - start, *size[1:])[: end - start] = rows
                yield begin, block
                del block  # before the next is made: the reader has let go of it too
            continue
        begin = (*at, *(0,) * len(size))
        extent = (*lead[1:], len(run), *size) if depth else size
        if not needed(begin, extent):
            continue
        block = np.zeros(extent, dtype)
        for p in (p for cell in run for p in layers[cell]):
            inside = tuple(slice(a - b, e - b) for (a, e), b in zip(p.where, begin, strict=True))
            view = p.theirs(block[inside])
            for start, stop, cut in p.cuts(dtype.itemsize):
                rows = tensors[p.tensor].rows(start, stop)
                p.copy(view[cut], rows.reshape(view[cut].shape))
                del rows
        del view
        yield begin, block
        del block


def _runs(places: Sequence[tuple[int, ...]], together: int) -> Iterator[list[tuple[int, ...]]]:
    """Cells in runs of at most so many that follow each other along the last of their axes."""
    run: list[tuple[int, ...]] = []
    for place in places:
        if run and (len(run) == together or place[:-1] != run[0][:-1]):
            yield run
            run = []
        run.append(place)
    yield run


def _by_rows(members: Sequence[Part], depth: int, size: tuple[int, ...]) -> bool:
    """Whether a cell is one tensor whose rows are its own, so that it need not be held whole."""
    p = members[0]
    rows = len(members) == 1 and p.straight and p.extent[depth] == p.shape[0]
    return rows and math.prod(p.extent[depth + 1 :]) == math.prod(size[1:])


def rows_of(p: Part, ours: np.ndarray) -> Iterator[np.ndarray]:
    """A tensor of theirs in blocks of its rows, from the region `ours[where]`."""
    view = p.theirs(ours)
    for start, stop, cut in p.cuts(ours.dtype.itemsize):
        rows = np.empty(view[cut].shape, ours.dtype)
        p.copy(rows, view[cut])
        yield rows.reshape(stop - start, *p.shape[1:])


def shapes(parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
    """The shape of each array that the parts make up."""
    found: dict[str, tuple[int, ...]] = {}
    for p in parts:
        ends = tuple(stop for _, stop in p.where)
        old = found.get(p.path, ends)
        found[p.path] = tuple(map(max, old, ends))
    return found
