"""A token store as a data set: rows of whole documents, by random access, many at a time.

B rows of a batch, L tokens in a row, P pieces in a batch, V vocabulary, S sources.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grain
import jax
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import Indexed, check_workers, read_batches
from lmjax.data.corpus import Split
from lmjax.data.origins import Origin, Piece
from lmjax.data.packing import Packing, Rows, pack
from lmjax.data.schedule import Schedule, schedule
from lmjax.data.store import Store, find_store
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Tokens(Indexed):
    """Next-token prediction over a store of tokens (docs/data.md); honours `core.Dataset`.

    An example has tokens and targets (int32 [length], targets one token ahead), weights (float32: 0
    at a document's last token and in padding), target_bytes (float32: UTF-8 bytes of text behind
    every target of weight 1), segments (int32: 1, 2, ... per document in the row, 0 for padding)
    and positions (int32, from the start of the segment in this row), as those of `text.Text`.

    An epoch of a source holds every token of every one of its documents once. The rows of the
    training split come in a permutation drawn from (seed, epoch, source); those of the validation
    split in order, whatever the seed. A batch is computed from (seed, step) alone.

    Args:
      path: what `python -m lmjax.prepare` wrote (its --workdir), the folder of its splits, or a
        store itself; local, or an address such as s3://bucket/corpus.
      split: which of its splits to read.
      length: tokens in an example, the context.
      packing: "fit" puts whole documents into rows, best fit decreasing, and cuts only those longer
        than a row; the rest is padding, under 1 % for corpora of many documents. "concatenate" cuts
        the documents of a source, one after another, every `length` tokens, and pads nothing.
      weights: source to its share of the examples, of which only ratios matter; sources left out
        are not read. Empty: the weights that the preparation gave its sources; where it gave none,
        every example of every source once an epoch.
      max_epochs: source to how often it may be gone through; others then fill its place.
      cache_bytes: how much of an object store may lie on the local disk. Give it room for all of
        the store: rows come from every shard in turn.
      workers: processes that read batches; 0 reads in this one. Batches do not depend on it.
    """

    path: str
    split: Split = "train"
    length: int = 1024
    packing: Packing = "fit"
    weights: Mapping[str, float] = field(default_factory=dict)
    max_epochs: Mapping[str, float] = field(default_factory=dict)
    cache_bytes: int = 2**40
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values that cannot work; opens nothing."""
        for name, given, allowed in (
            ("split", self.split, ("train", "valid")),
            ("packing", self.packing, ("fit", "concatenate")),
        ):
            if given not in allowed:
                raise UserError(f"{name} is {given!r}." + did_you_mean(str(given), allowed))
        if not 1 <= self.length < 2**31:
            raise UserError(f"length is {self.length}: give at least 1 token.")
        if not self.path.strip():
            raise UserError("path is empty: name the folder of a token store.")
        check_workers(self.workers)
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UserError(f"the weight of {name!r} is {weight}: give one above 0.")
        for name, cap in self.max_epochs.items():
            if not cap > 0:
                raise UserError(f"max_epochs of {name!r} is {cap}: give a number above 0.")
            if self.weights and name not in self.weights:
                raise UserError(
                    f"max_epochs names {name!r}, which has no weight."
                    + did_you_mean(name, self.weights)
                )

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        integers = ("tokens", "targets", "segments", "positions")
        floats = ("weights", "target_bytes")
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in integers}
        return spec | {name: jax.ShapeDtypeStruct((self.length,), np.float32) for name in floats}

    def check(self) -> None:
        """Opens the store and packs it where nobody has; raises UserError where that fails."""
        _ = self._examples(0)

    @property
    def tokenizer(self) -> TextTokenizer:
        """What made the tokens, as the store holds it."""
        return self.store.tokenizer

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return int(self.store.manifest["vocab_size"])

    @functools.cached_property
    def store(self) -> Store:
        """The store of this split, open."""
        return Store(find_store(self.path, self.split), self.cache_bytes)

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer.to_json()}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of the store's own and of the fields."""
        made_of = (self.store.fingerprint, self.split, self.length, self.packing)
        shares = (sorted(self._weights.items()), sorted(self.max_epochs.items()))
        return hashlib.sha256(repr((made_of, shares)).encode()).hexdigest()

    @property
    def num_examples(self) -> int:
        """Examples in an epoch of all sources together."""
        return self._rows.num_rows

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often `num_examples` drawn examples have gone through each source that is read."""
        names, plan = self._plan
        if plan.total is not None:
            num_examples = min(num_examples, plan.total)
        given = plan.given(num_examples)
        return {
            name: count / size
            for name, count, size in zip(names, given.tolist(), plan.sizes.tolist(), strict=True)
            if size and (not self._weights or name in self._weights)
        }

    def stacked(self, *, seed: int) -> PackedExamples:
        """The endless sequence of examples; the validation split's ignores the seed."""
        return self._examples(seed)

    def origins(self, *, seed: int) -> grain.MapDataset[Any]:
        """The `Origin` of every element of `examples(seed=seed)`."""
        return grain.MapDataset.range(sys.maxsize).map(self._examples(seed).origin)

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Generator[Batch, None, None]:
        """The split once, in order, every token once; rows of zeros complete the last batch."""
        return read_batches(
            replace(self._examples(0), plan=_in_order(self.num_examples), seed=None),
            batch_size=batch_size,
            shard=shard,
            num_shards=num_shards,
            num_examples=self.num_examples,
        )

    @functools.cached_property
    def _weights(self) -> Mapping[str, float]:
        """The shares of the sources that are read; {} for all of the store as one."""
        if self.weights or self.split == "valid":
            return self.weights
        told = self.store.manifest.get("weights") or {}
        return {name: told[name] for name in self.store.sources if told.get(name)}

    @functools.cached_property
    def _rows(self) -> Rows:
        return pack(self.store, length=self.length, packing=self.packing)

    @functools.cached_property
    def _plan(self) -> tuple[tuple[str, ...], Schedule]:
        """Names of what takes turns, and how: sources by weight, or all of the store as one."""
        weights, sources = self._weights, self.store.sources
        for given, names in (("weights", weights), ("max_epochs", self.max_epochs)):
            for name in names if self.split == "train" else ():
                if name not in sources:
                    raise UserError(
                        f"{self.store.path} has no source {name!r}, which {given} names."
                        + did_you_mean(name, sources)
                    )
        if self.max_epochs and not weights:
            raise UserError(
                "max_epochs limits sources that are drawn by weight: give weights as well."
            )
        if not weights or self.split == "valid":
            return (self.path,), _in_order(self.num_examples)
        sizes = np.diff(self._rows.first_rows).tolist()
        plan = schedule(sources, sizes, weights=weights, max_epochs=self.max_epochs)
        return sources, plan

    def _examples(self, seed: int) -> PackedExamples:
        return PackedExamples(
            store=self.store,
            table=self._rows,
            plan=self._plan[1],
            length=self.length,
            token_bytes=self.tokenizer.token_bytes(),
            seed=None if self.split == "valid" else int(seed) % 2**64,
        )


def validation(of: Tokens) -> Tokens:
    """The validation split of the same preparation, all of its sources once and in order."""
    return replace(of, split="valid", weights={}, max_epochs={})


def vocab_size(of: Tokens) -> int:
    """How many token ids the data uses, for a model's configuration."""
    return of.vocab_size


@dataclass(frozen=True, kw_only=True)
class PackedExamples:
    """Examples by number: a pure function, and the only thing that a worker process needs.

    Shapes: token_bytes [V]. `seed` is None where rows come in order.
    """

    store: Store
    table: Rows
    plan: Schedule
    length: int
    token_bytes: np.ndarray
    seed: int | None

    def rows(self, examples: Sequence[int]) -> Batch:
        """These examples, stacked; at 1,024 tokens a row some 10 ns a token."""
        size, table = self.length, self.table
        rows_B = self._rows_of(np.array(examples, np.int64))
        firsts_B = np.asarray(table.first_pieces[rows_B])
        counts_B = np.asarray(table.first_pieces[rows_B + 1]) - firsts_B
        before_B = np.cumsum(counts_B) - counts_B  # pieces of earlier rows
        number_P = np.arange(int(counts_B.sum())) - np.repeat(before_B, counts_B)
        pieces_P = number_P + np.repeat(firsts_B, counts_B)
        sizes_P = np.asarray(table.sizes[pieces_P]).astype(np.int64)
        goes_on_P = np.asarray(table.goes_on[pieces_P])
        row_P = np.repeat(np.arange(len(rows_B)), counts_B)
        used_B = np.add.reduceat(sizes_P, before_B)
        ends_P = np.cumsum(sizes_P) + row_P * size - np.repeat(np.cumsum(used_B) - used_B, counts_B)
        columns_P = ends_P - sizes_P  # in the flattened batch
        tokens = np.zeros((len(rows_B), size + 1), np.int32)
        self._copy(tokens.reshape(-1), pieces_P, columns_P + row_P, sizes_P + goes_on_P)

        at_end_B = before_B + counts_B
        runs = np.insert(sizes_P, at_end_B, size - used_B)  # with each row's padding after it
        segments = np.repeat(np.insert(number_P + 1, at_end_B, 0).astype(np.int32), runs)
        starts = np.insert(columns_P, at_end_B, 0).astype(np.int32)
        positions = np.arange(len(segments), dtype=np.int32) - np.repeat(starts, runs)
        weights = np.ones((len(rows_B), size), np.float32)
        weights.reshape(-1)[ends_P[~goes_on_P] - 1] = 0
        positions, segments = positions.reshape(weights.shape), segments.reshape(weights.shape)
        for row in np.flatnonzero(used_B < size).tolist():
            weights[row, used_B[row] :] = positions[row, used_B[row] :] = 0
        targets = np.ascontiguousarray(tokens[:, 1:])
        target_bytes = self.token_bytes[targets]
        target_bytes *= weights
        return {
            "tokens": np.ascontiguousarray(tokens[:, :-1]),
            "targets": targets,
            "weights": weights,
            "segments": segments,
            "positions": positions,
            "target_bytes": target_bytes,
        }

    def origin(self, example: int) -> Origin:
        """Which documents an example holds; the store keeps tokens alone, so no characters."""
        row, column, pieces = int(self._rows_of(np.array([example]))[0]), 0, []
        source = ""
        for piece in range(*self.table.first_pieces[row : row + 2].tolist()):
            begin, size = int(self.table.begins[piece]), int(self.table.sizes[piece])
            number = self.store.document_at(begin)
            name, source, first, _ = self.store.document(number)
            pieces.append(
                Piece(
                    columns=(column, column + size),
                    document=number,
                    name=name,
                    tokens=(begin - first, begin - first + size),
                    characters=None,
                )
            )
            column += size
        return Origin(source=source, pieces=tuple(pieces))

    def _rows_of(self, examples: np.ndarray) -> np.ndarray:
        """The row of each example: its source's turn, and a permutation of the source's epoch."""
        source, rank = self.plan.at(examples)
        epoch, rank = np.divmod(rank, self.plan.sizes[source])
        if self.seed is not None:
            for i, (s, e, r) in enumerate(
                zip(source.tolist(), epoch.tolist(), rank.tolist(), strict=True)
            ):
                last = int(self.plan.sizes[s]) - 1
                rank[i] = grain.experimental.index_shuffle(r, last, _draw(self.seed, e, s), 4)
        if len(self.plan.sizes) == 1:  # all of the store as one
            return rank
        return rank + np.asarray(self.table.first_rows)[source]

    def _copy(
        self, flat: np.ndarray, pieces_P: np.ndarray, columns_P: np.ndarray, sizes_P: np.ndarray
    ) -> None:
        """Copies pieces of the store to their places, shard by shard."""
        begins_P = np.asarray(self.table.begins[pieces_P])
        shards_P = np.searchsorted(self.store.first_tokens, begins_P, side="right") - 1
        begins_P = begins_P - self.store.first_tokens[shards_P]
        for shard in np.unique(shards_P).tolist():
            ids, own = self.store.tokens(shard), shards_P == shard
            where = (begins_P[own].tolist(), columns_P[own].tolist(), sizes_P[own].tolist())
            for begin, column, size in zip(*where, strict=True):
                flat[column : column + size] = ids[begin : begin + size]


def _in_order(num_examples: int) -> Schedule:
    return Schedule([num_examples], [1.0], [math.inf])


@functools.lru_cache(maxsize=256)
def _draw(seed: int, epoch: int, source: int) -> int:
    """The seed of the permutation of an epoch of a source."""
    return int(np.random.default_rng((seed, epoch, source)).integers(2**32))
