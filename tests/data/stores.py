"""Token stores made of a seed, and what they hold as plain lists."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lmjax.core import Batch
from lmjax.data.store import seal_store, write_shard
from lmjax.data.tokenizer import ByteTokenizer

END = ByteTokenizer().end_id
SIZES = [*np.random.default_rng(1).integers(1, 70, 90).tolist(), 64, 32, 33, 1, 200]
VALID_SIZES = [5, 40, 7, 90]


def random_documents(sizes: Sequence[int], *, seed: int = 0) -> list[np.ndarray]:
    """Documents of so many tokens, each with its end."""
    random = np.random.default_rng(seed)
    return [np.append(random.integers(0, 256, size - 1), END) for size in sizes]


def write_store(
    folder: Path,
    documents: Sequence[np.ndarray],
    *,
    sources: Sequence[str] = ("a",),
    num_shards: int = 1,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """A store of these documents, whose sources take turns, cut into shards."""
    names = [f"doc{number}" for number in range(len(documents))]
    of = [sources[number % len(sources)] for number in range(len(documents))]
    cuts = np.linspace(0, len(documents), num_shards + 1).astype(int).tolist()
    for shard in range(num_shards):
        here = slice(cuts[shard], cuts[shard + 1])
        sizes = [len(document) for document in documents[here]]
        write_shard(
            folder,
            shard,
            ids=np.concatenate([*documents[here], np.zeros(0, int)]),
            starts=np.concatenate([[0], np.cumsum(sizes)]),
            sources=of[here],
            names=names[here],
            vocab_size=257,
        )
    seal_store(folder, tokenizer=ByteTokenizer(), more=more)
    return folder


def write_corpus(folder: Path) -> Path:
    """Two splits: documents of `SIZES` of two sources in three shards, and of `VALID_SIZES`."""
    write_store(folder / "train", random_documents(SIZES), sources=("a", "b", "a"), num_shards=3)
    write_store(folder / "valid", random_documents(VALID_SIZES, seed=1))
    return folder


def take(batches: Iterable[Batch], count: int) -> list[Batch]:
    """So many batches; the reader is closed."""
    taken = list(itertools.islice(batches, count))
    getattr(batches, "close", lambda: None)()
    return taken


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    """Array for array."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
