"""Batches of random-access examples: row r of global batch s is example `s * batch_size + r`."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from lmjax.core import Batch, Dataset, TextDataset
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError

MAX_WORKERS = 512


class Examples(Protocol):
    """Examples by number, read many at a time: a pure function, which worker processes share."""

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples, stacked; at least one."""
        ...


@dataclass(frozen=True)
class OneByOne:
    """Examples that are made one at a time, by `at`."""

    at: Callable[[int], Mapping[str, np.ndarray]]

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples, stacked."""
        return stack([self.at(index) for index in examples])


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Other examples, each changed by `change(seed, number, example)`."""

    examples: Examples
    change: Callable[[int, int, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    seed: int

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples, stacked."""
        return self.changed(self.examples.rows(examples), examples)

    def changed(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        """The examples of these numbers, which the batch holds as they were."""
        made = []
        for row, number in enumerate(numbers):
            example = {name: value[row] for name, value in batch.items()}
            made.append(self.change(self.seed, number, example))
        return stack(made)

    def epoch(
        self, batches: Iterator[Batch], *, batch_size: int, shard: int, num_shards: int
    ) -> Iterator[Batch]:
        """Batches of an epoch, each changed by the numbers of its rows in the epoch."""
        rows = batch_size // num_shards
        for step, batch in enumerate(batches):
            first = step * batch_size + shard * rows
            yield self.changed(batch, range(first, first + rows))


def stack(examples: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    """Examples as a batch."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


class Indexed(Protocol):
    """A data set with an endless sequence of examples by number; gives what inherits it batches."""

    @property
    def workers(self) -> int:
        """Processes that read batches; 0 reads in this one."""
        return 0

    def stacked(self, *, seed: int) -> Examples:
        """The endless sequence of examples, many at a time."""
        ...

    def examples(self, *, seed: int) -> grain.MapDataset[Any]:
        """The same, one by one."""
        at = _At(self.stacked(seed=seed))
        return grain.MapDataset.range(sys.maxsize).map(at)

    def batches(
        self, *, batch_size: int, seed: int, shard: int = 0, num_shards: int = 1, start: int = 0
    ) -> Generator[Batch, None, None]:
        """Endless batches, from (seed, step) alone."""
        return read_batches(
            self.stacked(seed=seed),
            batch_size=batch_size,
            shard=shard,
            num_shards=num_shards,
            start=start,
            workers=self.workers,
        )


class Source(Dataset, Protocol):
    """A data set that others can be made of: its examples come by number."""

    def stacked(self, *, seed: int) -> Examples:
        """The endless sequence of examples, many at a time."""
        ...


class TextSource(Source, TextDataset, Protocol):
    """Likewise, of text."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """What made the tokens."""
        ...


@dataclass(frozen=True)
class _At:
    """One example; a class, as workers pickle it."""

    examples: Examples

    def __call__(self, index: int) -> Mapping[str, np.ndarray]:
        return {name: value[0] for name, value in self.examples.rows([index]).items()}


def check_workers(workers: int) -> None:
    """Raises UserError for a number of reading processes that no machine wants to start."""
    if not 0 <= workers <= MAX_WORKERS:
        raise UserError(
            f"workers is {workers}: give 0, to read in the training process itself, or up to "
            f"{MAX_WORKERS} processes."
        )


def read_batches(
    examples: Examples,
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
      examples: dicts of arrays of one shape, by number.
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

    examples: Examples
    batch_size: int
    rows: int
    first: int
    num_examples: int | None

    def __call__(self, step: int) -> Batch:
        begin = step * self.batch_size + self.first
        end = begin + self.rows
        if self.num_examples is not None:
            end = min(end, self.num_examples)
        wanted = range(begin, end)
        batch = self.examples.rows(wanted or range(1))
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
