"""Several data sets in given proportions, as one."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import Indexed, Source, check_workers
from lmjax.data.mixed import MixedExamples, Turn
from lmjax.data.origins import Origin
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError, did_you_mean

LARGEST_WEIGHT = 1e9


@dataclass(frozen=True, kw_only=True)
class Mixture(Indexed):
    """Examples drawn from each source in proportion to its weight; honours `core.Dataset`.

    Sources are data sets of any kind whose examples have the same arrays, and of which the same was
    learned (`fitted`: the tokenizer, the classes). The order is fixed and evenly spread: after any
    number of examples each source has given its share to within one example (weights to within a
    hundredth of the smallest). Every source goes through its own epochs, in its own permutations.

    Args:
      sources: name to data set.
      weights: name to a number, one for each source; only their ratios matter. A source of weight 0
        is not read.
      leave_out: arrays that are left out of the examples of those sources that have them:
        "target_bytes" of text that is mixed with conversations.
      workers: processes that read batches; 0 reads in this one.
    """

    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    leave_out: Sequence[str] = ()
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
            if weight != 0 and not 1 / LARGEST_WEIGHT <= weight <= LARGEST_WEIGHT:
                raise UserError(
                    f"the weight of {name!r} is {weight}: give 0, not to read it, or a number "
                    f"between {1 / LARGEST_WEIGHT:.0e} and {LARGEST_WEIGHT:.0e}."
                )
        if not self._read:
            raise UserError(
                f"every weight is 0 ({', '.join(self.weights)}): give one above 0, or nothing is "
                "read."
            )
        check_workers(self.workers)
        for name in self.leave_out:
            every = {array for source in self.sources.values() for array in source.example}
            if name not in every:
                raise UserError(
                    f"leave_out names {name!r}, which no example has." + did_you_mean(name, every)
                )
        first, *others = self.sources
        for name in others:
            self._compare(name, first)

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example, the same for every source."""
        return self._left(next(iter(self.sources.values())).example)

    @property
    def fitted(self) -> Mapping[str, str]:
        """That of every source; raises UserError where they differ."""
        (first, source), *others = self._read.items()
        given = source.fitted
        for name, other in others:
            found = other.fitted
            for key in sorted({*found, *given}):
                if found.get(key) != given.get(key):
                    raise UserError(_differ(key, {name: found.get(key), first: given.get(key)}))
        return given

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of text, the one tokenizer."""
        assert self.fitted  # raises where they differ
        tokenizer: TextTokenizer = _of(self._any, "tokenizer")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Of text, how many token ids there are."""
        assert self.fitted  # raises where they differ
        return max(int(_of(source, "vocab_size")) for source in self._read.values())

    @property
    def classes(self) -> tuple[str, ...]:
        """Of labelled data, the names of the labels."""
        assert self.fitted  # raises where they differ
        names: tuple[str, ...] = _of(self._any, "classes")
        return names

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of the sources' own, names and weights."""
        made_of: list[Any] = [
            (name, float(self.weights[name]), source.fingerprint)
            for name, source in self._read.items()
        ]
        if self.leave_out:
            made_of.append(sorted(self.leave_out))
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def check(self) -> None:
        """Opens every source; raises UserError where one cannot give an example."""
        assert self.fitted is not None  # raises where they differ
        for source in self._read.values():
            source.check()

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often each source has been gone through, by its name here."""
        whole = sum(self.weights.values())
        result = {}
        for name, source in self._read.items():
            inner = source.epochs(round(num_examples * self.weights[name] / whole))
            for key, value in inner.items():
                result[name if len(inner) == 1 else f"{name}/{key}"] = value
        return result

    def stacked(self, *, seed: int) -> MixedExamples:
        """The endless mixed sequence; each source's seed is made of `seed` and its name."""
        assert self.fitted is not None  # raises where they differ
        sources = self._read.items()
        turns = (grain.MapDataset.range(sys.maxsize).map(Turn(i)) for i in range(len(sources)))
        return MixedExamples(
            turns=self._mix(turns),
            sources=tuple(source.stacked(seed=_seed_for(seed, name)) for name, source in sources),
            leave_out=tuple(self.leave_out),
        )

    def origins(self, *, seed: int) -> grain.MapDataset[Any]:
        """The `Origin` of every element of `examples(seed=seed)`, each named by its source."""
        return self._mix(
            _origins(source, _seed_for(seed, name)).map(functools.partial(_from_source, name))
            for name, source in self._read.items()
        )

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """Every example of every source once, one source after another, whatever the weights."""
        for source in self._read.values():
            for batch in source.epoch_batches(
                batch_size=batch_size, shard=shard, num_shards=num_shards
            ):
                yield self._left(batch)

    @property
    def _read(self) -> Mapping[str, Source]:
        """The sources that are read, in their order."""
        return {name: source for name, source in self.sources.items() if self.weights[name]}

    @property
    def _any(self) -> Source:
        return next(iter(self._read.values()))

    def _left(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in arrays.items() if name not in self.leave_out}

    def _compare(self, name: str, first: str) -> None:
        """Raises UserError unless the examples of these sources have the same arrays."""
        one, other = (self._left(self.sources[key].example) for key in (first, name))
        if one == other:
            return
        shared = [key for key in one if key in other]
        some = sorted(set(one) ^ set(other))
        if not any(one[key] != other[key] for key in shared) and some == ["target_bytes"]:
            fix = "Set leave_out=('target_bytes',), and bits per byte are not told."
        else:
            fix = "Give both the same length and packing, or size, or columns."
        raise UserError(
            f"the examples of {name!r} and {first!r} differ: {_spell(other)} and {_spell(one)}. "
            + fix
        )

    def _mix(self, parts: Iterable[grain.MapDataset[Any]]) -> grain.MapDataset[Any]:
        """One sequence of the sources' own, in the order of `sources`."""
        return grain.MapDataset.mix(
            list(parts), weights=[self.weights[name] for name in self._read]
        )


def _of(source: Source, name: str) -> Any:
    """What sources of some kinds have; AttributeError of the others."""
    return getattr(source, name)


def _origins(source: Source, seed: int) -> grain.MapDataset[Any]:
    """Those of a source; of one that tells none, origins without pieces."""
    told = getattr(source, "origins", None)
    if told is None:
        return grain.MapDataset.range(sys.maxsize).map(_untold)
    found: grain.MapDataset[Any] = told(seed=seed)
    return found


def _untold(index: int) -> Origin:
    del index
    return Origin(pieces=None)


def _from_source(name: str, origin: Origin) -> Origin:
    return replace(origin, source=f"{name}/{origin.source}" if origin.source else name)


def _seed_for(seed: int, name: str) -> int:
    words = (int(seed) % 2**64, zlib.crc32(name.encode()))
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _differ(key: str, given: Mapping[str, str | None]) -> str:
    """What is wrong with two sources of which something else was learned, and what to do."""
    (name, one), (first, other) = given.items()
    if key == "tokenizer":
        return (
            f"{name!r} and {first!r} are read with different tokenizers. Give both Bytes(), or "
            "the same Pretrained(path=...), which no corpus changes; or read one with the other's, "
            "by vocabulary=Shared(of=...)."
        )
    if key == "classes" and one and other:
        return (
            f"{name!r} and {first!r} have different classes: {', '.join(json.loads(one))} and "
            f"{', '.join(json.loads(other))}. Give both the same labels, in the same order."
        )
    return f"{name!r} and {first!r} have another {key}: mix what was fitted to the same data."


def _spell(example: Spec) -> str:
    return ", ".join(f"{name} {leaf.shape} {leaf.dtype}" for name, leaf in example.items())
