"""Token stores made of a seed, and what they hold as plain lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lmjax.data.store import seal_store, write_shard
from lmjax.data.tokenizer import ByteTokenizer

END = ByteTokenizer().end_id


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
