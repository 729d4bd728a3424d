"""Several data sets in given proportions, as one."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import read_batches
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError, did_you_mean


class Source(Protocol):
    """What can be mixed: `Text`, or a `Mixture` of them."""

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """What its text is read with."""
        ...

    def check(self) -> None:
        """Opens it; raises UserError where it cannot give an example."""
        ...

    def examples(self, *, seed: int) -> grain.MapDataset[Any]:
        """Endless random access to the source's examples."""
        ...

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """Every example once, in order."""
        ...

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often `num_examples` drawn examples have gone through it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Examples drawn from each source in proportion to its weight; honours `core.Dataset`.

    The order is fixed and evenly spread: after any number of examples each source has given its
    share to within one example (weights to within a hundredth of the smallest). Every source goes
    through its own epochs, in its own permutations.

    Args:
      sources: name to data set; all with one context length, packing and tokenizer.
      weights: name to a positive number, one for each source; only their ratios matter.
      workers: processes that read batches; 0 reads in this one.
    """

    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses sources that cannot be mixed."""
        if not self.sources:
            raise UserError(
                "a mixture needs at least one source: give sources={'name': Text(...)}."
            )
        for name in set(self.weights) ^ set(self.sources):
            side = "source" if name in self.weights else "weight"
            raise UserError(
                f"the mixture has no {side} {name!r}." + did_you_mean(name, self.sources)
            )
        for name, weight in self.weights.items():
            if not weight > 0:
                raise UserError(
                    f"the weight of {name!r} is {weight}: make it positive, or drop the source."
                )
        first, *others = self.sources
        for name in others:
            if self.sources[name].example != self.example:
                raise UserError(
                    f"the examples of {name!r} and {first!r} differ: {_spell(self.sources[name])} "
                    f"and {_spell(self.sources[first])}. Give both the same length and packing."
                )

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example, the same for every source."""
        return next(iter(self.sources.values())).example

    @property
    def tokenizer(self) -> TextTokenizer:
        """The one tokenizer; raises UserError where sources were given different ones."""
        (first, given), *others = self.sources.items()
        for name, source in others:
            if source.tokenizer.hash != given.tokenizer.hash:
                raise UserError(
                    f"{name!r} and {first!r} are read with different tokenizers. Give both "
                    "Bytes(), or the same Pretrained(path=...), which no corpus changes."
                )
        return given.tokenizer

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return self.tokenizer.vocab_size

    def check(self) -> None:
        """Opens every source; raises UserError where one cannot give an example."""
        assert self.tokenizer is not None  # raises unless it is one and the same
        for source in self.sources.values():
            source.check()

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often each source has been gone through, by its name here."""
        whole = sum(self.weights.values())
        result = {}
        for name, source in self.sources.items():
            inner = source.epochs(round(num_examples * self.weights[name] / whole))
            for key, value in inner.items():
                result[name if len(inner) == 1 else f"{name}/{key}"] = value
        return result

    def examples(self, *, seed: int) -> grain.MapDataset[Any]:
        """The endless mixed sequence; each source's seed is made of `seed` and its name."""
        assert self.tokenizer is not None  # raises unless it is one and the same
        mixed = [
            source.examples(seed=_seed_for(seed, name)) for name, source in self.sources.items()
        ]
        return grain.MapDataset.mix(mixed, weights=[self.weights[name] for name in self.sources])

    def batches(
        self, *, batch_size: int, seed: int, shard: int = 0, num_shards: int = 1, start: int = 0
    ) -> Generator[Batch, None, None]:
        """Endless batches, a function of (seed, step) alone."""
        return read_batches(
            self.examples(seed=seed),
            batch_size=batch_size,
            shard=shard,
            num_shards=num_shards,
            start=start,
            workers=self.workers,
        )

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """Every example of every source once, one source after another, whatever the weights."""
        for source in self.sources.values():
            yield from source.epoch_batches(
                batch_size=batch_size, shard=shard, num_shards=num_shards
            )


def _seed_for(seed: int, name: str) -> int:
    words = (int(seed) % 2**64, zlib.crc32(name.encode()))
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _spell(source: Source) -> str:
    return ", ".join(f"{name} {leaf.shape}" for name, leaf in source.example.items())
