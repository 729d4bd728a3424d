"""`python -m benchmarks.loader [--rounds=5]`: tokens per second of one process that feeds a run.

A store of synthetic documents (lognormal lengths, median 400 tokens) is read in turn by

  loader   `Tokens.batches`, best-fit packing, all six arrays, as a run reads it
  mixed    the same with three sources by weight
  copy     the bound: numpy copies as many bytes as a batch has, from memory to memory
  uint16   flat ids of the store alone, read in rows at random starts and made int32

The need: a v5p host has 4 chips. A model of N = 1e9 parameters costs 6 N FLOP a token (Kaplan et
al., arXiv:2001.08361, section 2.1; attention left out, which would lower the need), so that at 60 %
of the peak the host takes 4 * 459e12 * 0.6 / 6e9 tokens a second. Rates are medians over rounds; of
the process's own CPU seconds beside wall seconds, as other programs may run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lmjax.data.packed import Tokens
from lmjax.data.store import seal_store, write_shard
from lmjax.data.tokenizer import ByteTokenizer
from lmjax.hardware import CHIPS

CHIPS_PER_HOST, UTILISATION, PARAMETERS = 4, 0.6, 1e9
BARS = {"tokens_per_s": 10e6, "times_the_need": 5.0}


def need() -> float:
    """Tokens a second that a v5p host takes."""
    flop_per_s = CHIPS_PER_HOST * CHIPS["TPU v5p"].flop_per_s * UTILISATION
    return flop_per_s / (6 * PARAMETERS)


def make_store(folder: Path, num_tokens: int) -> None:
    random, made, shard = np.random.default_rng(0), 0, 0
    while made < num_tokens:
        sizes = np.maximum(2, random.lognormal(6, 1.1, 20_000)).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        ids = random.integers(0, 50_000, starts[-1], dtype=np.uint16)
        ids %= 256  # of the byte tokenizer, whose table of lengths is as cheap to look up
        sources = [("web", "code", "books")[i % 3] for i in range(len(sizes))]
        names = [f"{shard}#{i}" for i in range(len(sizes))]
        made += int(starts[-1])
        write_shard(
            folder, shard, ids=ids, starts=starts, sources=sources, names=names, vocab_size=257
        )
        shard += 1
    seal_store(folder, tokenizer=ByteTokenizer())


def sides(data: Tokens, batch_size: int) -> dict[str, Iterator[object]]:
    """Endless iterators, of a batch each."""
    store, size = data.store, data.length
    like = np.zeros((6, batch_size, size), np.int32)
    ids = [store.tokens(shard) for shard in range(len(store.manifest["shards"]))]
    random = np.random.default_rng(0)

    def endless(make: Callable[[], object]) -> Iterator[object]:
        while True:
            yield make()

    def rows() -> np.ndarray:
        made = np.empty((batch_size, size), np.int32)
        for row in made:
            shard = ids[random.integers(len(ids))]
            start = random.integers(len(shard) - size)
            row[:] = shard[start : start + size]
        return made

    mixed = Tokens(path=data.path, length=size, weights={"web": 0.6, "code": 0.3, "books": 0.1})
    return {
        "loader": data.batches(batch_size=batch_size, seed=0),
        "mixed": mixed.batches(batch_size=batch_size, seed=0),
        "copy": endless(like.copy),
        "uint16": endless(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40, help="in a turn")
    parser.add_argument("--tokens", type=float, default=60e6, help="in the store")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LMJAX_CACHE"] = f"{folder}/cache"
        make_store(Path(folder, "store"), int(options.tokens))
        data = Tokens(path=f"{folder}/store", length=options.length)
        began = time.process_time()
        data.check()
        packed_s = time.process_time() - began
        turns = sides(data, options.batch_size)
        tokens = options.batches * options.batch_size * options.length
        wall: dict[str, list[float]] = {name: [] for name in turns}
        cpu: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(options.rounds + 1):
            for name, batches in turns.items():
                clock, used = time.perf_counter(), time.process_time()
                for _ in range(options.batches):
                    next(batches)
                wall[name].append(tokens / (time.perf_counter() - clock))
                cpu[name].append(tokens / (time.process_time() - used))
        far = time.perf_counter()
        with contextlib.closing(data.batches(batch_size=64, seed=0, start=10_000_000)) as late:
            next(late)
        resume_s = time.perf_counter() - far
        for batches in turns.values():
            batches.close()  # type: ignore[attr-defined]  # a generator, of a protocol's Iterator
        found = {
            "tokens_in_store": data.store.num_tokens,
            "filled": data.store.num_tokens / (data.num_examples * options.length),
            "packing_tokens_per_cpu_s": data.store.num_tokens / packed_s,
            "resume_at_10M_s": resume_s,
            "tokens_per_s": {n: statistics.median(v[1:]) for n, v in wall.items()},
            "tokens_per_cpu_s": {n: statistics.median(v[1:]) for n, v in cpu.items()},
            "need_tokens_per_s": need(),
        }
    found["times_the_need"] = found["tokens_per_s"]["loader"] / need()
    found["of_a_copy"] = found["tokens_per_s"]["loader"] / found["tokens_per_s"]["copy"]
    found["bars"] = BARS
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
