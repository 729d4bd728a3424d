"""Several data sets in given proportions, as one."""

from __future__ import annotations

import functools
import hashlib
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import grain
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import Examples, check_workers, read_batches
from lmjax.data.mixed import MixedExamples, Turn
from lmjax.data.origins import Origin
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError, did_you_mean

LARGEST_WEIGHT = 1e9


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

    @property
    def fingerprint(self) -> str:
        """Names what its examples are made of."""
        ...

    def check(self) -> None:
        """Opens it; raises UserError where it cannot give an example."""
        ...

    def examples(self, *, seed: int) -> grain.MapDataset[Any]:
        """Endless random access to the source's examples."""
        ...

    def origins(self, *, seed: int) -> grain.MapDataset[Any]:
        """Where each of those examples comes from."""
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
            if not 1 / LARGEST_WEIGHT <= weight <= LARGEST_WEIGHT:
                raise UserError(
                    f"the weight of {name!r} is {weight}: make it positive, and between "
                    f"{1 / LARGEST_WEIGHT:.0e} and {LARGEST_WEIGHT:.0e}, or drop the source."
                )
        check_workers(self.workers)
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

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer.to_json()}

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of the sources' own, names and weights."""
        made_of = [
            (name, float(self.weights[name]), source.fingerprint)
            for name, source in self.sources.items()
        ]
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

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
        return self._mix(
            source.examples(seed=_seed_for(seed, name)) for name, source in self.sources.items()
        )

    def stacked(self, *, seed: int) -> MixedExamples | None:
        """The same sequence, read many at a time; None unless all sources can."""
        assert self.tokenizer is not None  # raises unless it is one and the same
        parts: list[Examples] = []
        for name, source in self.sources.items():
            read = getattr(source, "stacked", None)
            part = read(seed=_seed_for(seed, name)) if read else None
            if part is None:
                return None
            parts.append(part)
        turns = (grain.MapDataset.range(sys.maxsize).map(Turn(i)) for i in range(len(parts)))
        return MixedExamples(turns=self._mix(turns), sources=tuple(parts))

    def origins(self, *, seed: int) -> grain.MapDataset[Any]:
        """The `Origin` of every element of `examples(seed=seed)`, each named by its source."""
        return self._mix(
            source.origins(seed=_seed_for(seed, name)).map(functools.partial(_from_source, name))
            for name, source in self.sources.items()
        )

    def batches(
        self, *, batch_size: int, seed: int, shard: int = 0, num_shards: int = 1, start: int = 0
    ) -> Generator[Batch, None, None]:
        """Endless batches, a function of (seed, step) alone."""
        return read_batches(
            self.stacked(seed=seed) or self.examples(seed=seed),
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

    def _mix(self, parts: Iterable[grain.MapDataset[Any]]) -> grain.MapDataset[Any]:
        """One sequence of the sources' own, in the order of `sources`."""
        return grain.MapDataset.mix(
            list(parts), weights=[self.weights[name] for name in self.sources]
        )


def _from_source(name: str, origin: Origin) -> Origin:
    return replace(origin, source=f"{name}/{origin.source}" if origin.source else name)


def _seed_for(seed: int, name: str) -> int:
    words = (int(seed) % 2**64, zlib.crc32(name.encode()))
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _spell(source: Source) -> str:
    return ", ".join(f"{name} {leaf.shape}" for name, leaf in source.example.items())
