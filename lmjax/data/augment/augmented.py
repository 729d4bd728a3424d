"""A data set whose examples are augmented on their way into a run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grain
import jax
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import Examples, Indexed, Source
from lmjax.errors import UserError, did_you_mean


class Augmentation(Protocol):
    """A pure function of (array, seed, index); shapes depend on shapes alone."""

    def __call__(self, array: Any, /, *, seed: int, index: int) -> Any:
        """The array of example `index`, augmented."""
        ...


@dataclass(frozen=True, kw_only=True)
class Augmented(Indexed):
    """Another data set with arrays of its examples augmented; honours `core.Dataset`.

    Example i of a run is augmented by (seed, i): batches stay a function of (seed, step), and as
    examples are counted over epochs, an example that comes again is augmented anew. `epoch_batches`
    leaves all as it is; so do evaluations, which are given the data set within.

    Args:
      data: the data set: any with `stacked(seed=...)`.
      arrays: name of an array of an example, to what is done to it, in this order:
        {"tokens": (TokenDropout(...),)} or {"images": (RandomCrop(...), Flip())}.
      seed: added to the run's: another one draws other augmentations of the same examples.
    """

    data: Source
    arrays: Mapping[str, Sequence[Augmentation]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses arrays that examples do not have."""
        for name in self.arrays:
            if name not in self.data.example:
                raise UserError(
                    f"arrays names {name!r}, which no example has."
                    + did_you_mean(name, self.data.example)
                )

    @functools.cached_property
    def example(self) -> Spec:
        """Shapes and dtypes of one example, as augmentations leave them; needs no data."""
        spec = dict(self.data.example)
        for name, leaf in spec.items():
            if name in self.arrays:
                made = _apply(np.zeros(leaf.shape, leaf.dtype), self.arrays[name], 0, 0)
                spec[name] = jax.ShapeDtypeStruct(made.shape, made.dtype)
        return spec

    def check(self) -> None:
        """Opens the data; raises UserError where it cannot give an example."""
        self.data.check()
        assert self.example

    @property
    def fitted(self) -> Mapping[str, str]:
        """That of the data set within."""
        return self.data.fitted

    @property
    def classes(self) -> tuple[str, ...]:
        """Of labelled data."""
        names: tuple[str, ...] = self._within("classes")
        return names

    @property
    def tokenizer(self) -> Any:
        """Of text."""
        return self._within("tokenizer")

    def _within(self, name: str) -> Any:
        """What the data set within has; AttributeError where it has none."""
        return getattr(self.data, name)

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        size: int = self._within("vocab_size")
        return size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of the data's own and of what is done to it."""
        done = sorted((name, repr(tuple(made))) for name, made in self.arrays.items())
        made_of = repr((self.data.fingerprint, done, self.seed))
        return hashlib.sha256(made_of.encode()).hexdigest()

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often each source has been gone through."""
        return self.data.epochs(num_examples)

    def stacked(self, *, seed: int) -> AugmentedExamples:
        """The endless sequence of examples, read many at a time."""
        examples = self.data.stacked(seed=seed)
        return AugmentedExamples(examples=examples, arrays=self.arrays, seed=int(seed) + self.seed)

    @property
    def origins(self) -> Callable[..., grain.MapDataset[Any]]:
        """`origins(seed=...)` of the data set within, where it has it."""
        found: Callable[..., grain.MapDataset[Any]] = self._within("origins")
        return found

    @property
    def workers(self) -> int:
        """Those of the data set within."""
        return getattr(self.data, "workers", 0)

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """Every example once, in order, as it is."""
        return self.data.epoch_batches(batch_size=batch_size, shard=shard, num_shards=num_shards)


@dataclass(frozen=True, kw_only=True)
class AugmentedExamples:
    """Augmented examples by number: a pure function, and all that a worker process needs."""

    examples: Examples
    arrays: Mapping[str, Sequence[Augmentation]]
    seed: int

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples, stacked."""
        batch = dict(self.examples.rows(examples))
        for name, made in self.arrays.items():
            rows = zip(batch[name], examples, strict=True)
            batch[name] = np.stack([_apply(row, made, self.seed, index) for row, index in rows])
        return batch


def _apply(array: Any, augmentations: Sequence[Augmentation], seed: int, index: int) -> Any:
    for augment in augmentations:
        array = augment(array, seed=seed, index=index)
    return array
