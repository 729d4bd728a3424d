"""Batches of random-access examples: row r of global batch s is example `s * batch_size + r`."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from lmjax.core import Batch
from lmjax.errors import UserError

MAX_WORKERS = 512


class Examples(Protocol):
    """Examples that are read many at a time."""

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples, stacked; at least one."""
        ...


def check_workers(workers: int) -> None:
    """Raises UserError for a number of reading processes that no machine wants to start."""
    if not 0 <= workers <= MAX_WORKERS:
        raise UserError(
            f"workers is {workers}: give 0, to read in the training process itself, or up to "
            f"{MAX_WORKERS} processes."
        )


def read_batches(
    examples: grain.MapDataset[Any] | Examples,
    *,
    batch_size: int,
    shard: int = 0,
    num_shards: int = 1,
    start: int = 0,
    workers: int = 0,
    num_examples: int | None = None,
) -> Generator[Batch, None, None]:
    """Yields this shard's rows of the global batches `start`, `start + 1`, ...

    A shard's rows are consecutive: [shard, shard + 1) * batch_size / num_shards. Starting anywhere
    costs the same. The iterator has `close()`, which ends its thread and processes.

    Args:
      examples: dicts of arrays of one shape, one by one or many at a time.
      batch_size: rows of a global batch.
      shard: which of the shards to read.
      num_shards: how many shards a batch is cut into; divides batch_size.
      start: the first batch to yield.
      workers: 0 reads in this process, one thread ahead; n > 0 reads in n processes.
      num_examples: if given, batches end after so many examples, and zeros fill up the last one.
    """
    if num_shards < 1 or batch_size < 1 or batch_size % num_shards:
        raise UserError(
            f"batch_size {batch_size} does not divide among {num_shards} shards: make it a "
            "multiple of the number of processes."
        )
    if not 0 <= shard < num_shards or start < 0 or workers < 0:
        raise UserError(
            f"shard {shard} of {num_shards}, start {start}, workers {workers}: the shard must lie "
            "in [0, num_shards), the others at 0 or above."
        )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags
    rows = batch_size // num_shards
    reader = _Reader(examples, batch_size, rows, shard * rows, num_examples)
    num_batches = sys.maxsize if num_examples is None else -(-num_examples // batch_size)
    batches = grain.MapDataset.range(start, max(start, num_batches)).map(reader)
    read = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if workers:
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        read = read.mp_prefetch(processes)
    iterator = _closing(iter(read))
    atexit.register(_close, weakref.ref(iterator))  # or shared memory outlives the interpreter
    return iterator


def _closing(iterator: grain.DatasetIterator[Any]) -> Generator[Batch, None, None]:
    try:
        yield from iterator
    finally:
        iterator.close()


def _close(reference: weakref.ref[Generator[Batch, None, None]]) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


@dataclass(frozen=True)
class _Reader:
    """Step to batch: a pure function, and the only thing that a worker process needs."""

    examples: grain.MapDataset[Any] | Examples
    batch_size: int
    rows: int
    first: int
    num_examples: int | None

    def __call__(self, step: int) -> Batch:
        begin = step * self.batch_size + self.first
        end = begin + self.rows
        if self.num_examples is not None:
            end = min(end, self.num_examples)
        if not isinstance(self.examples, grain.MapDataset):
            return self._stacked(self.examples, range(begin, end))
        read = [self.examples[index] for index in range(begin, end)]
        if len(read) < self.rows:
            like = read[0] if read else self.examples[0]
            blank = {name: np.zeros_like(value) for name, value in like.items()}
            read += [blank] * (self.rows - len(read))
        return {name: np.stack([example[name] for example in read]) for name in read[0]}

    def _stacked(self, examples: Examples, wanted: range) -> Batch:
        """Likewise, of examples that come stacked."""
        batch = examples.rows(wanted or range(1))
        if len(wanted) == self.rows:
            return batch
        blank = {
            name: np.zeros((self.rows - len(wanted), *value.shape[1:]), value.dtype)
            for name, value in batch.items()
        }
        return {
            name: np.concatenate([value[: len(wanted)], blank[name]])
            for name, value in batch.items()
        }
