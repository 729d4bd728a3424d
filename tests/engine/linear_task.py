"""A task of three numbers for tests of the engine: compiles in no time, knows its gradients."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax import sharding
from lmjax.core import Mean, Output, Work
from lmjax.engine.run import Run
from lmjax.sharding import Boxed


@dataclasses.dataclass(frozen=True)
class Linear:
    """Weighted squared error of x . kernel + offset; counts batches in its mutable state."""

    init_scale: float = 1.0

    def init(self, rng, batch):
        kernel = self.init_scale * jax.random.normal(rng, (2,))
        return {
            "params": {"kernel": Boxed(kernel, ("embed",)), "offset": Boxed(jnp.zeros(()), ())},
            "counts": {"batches": jnp.zeros(())},
        }

    def loss(self, variables, batch, rng, *, train):
        params = variables["params"]
        error = batch["x"] @ params["kernel"] + params["offset"] - batch["y"]
        counts = {"batches": variables["counts"]["batches"] + 1}
        return Output(
            loss=Mean.of(sharding.shard(error, "batch") ** 2, batch["weights"]),
            metrics={"absolute": Mean.of(jnp.abs(error), batch["weights"])},
            model_state={"counts": counts} if train else {},
        )

    def check(self, data):
        pass

    def work(self, example):
        return Work(unit="rows", units=1, flop=12.0, flop_full=12.0)

    def count_params(self, params):
        return {name: x.size for name, x in params.items()}


@dataclasses.dataclass(frozen=True)
class Points:
    """Points of a plane, batch s a function of (seed, s); weights of 0, 1 and 2."""

    nan_at: int = -1
    tokenizer_text: str = "none"

    example: ClassVar = {
        "x": jax.ShapeDtypeStruct((2,), np.float32),
        "y": jax.ShapeDtypeStruct((), np.float32),
        "weights": jax.ShapeDtypeStruct((), np.float32),
    }
    fingerprint = "points"

    def check(self):
        pass

    @property
    def fitted(self):
        return {"tokenizer": self.tokenizer_text}

    def batches(self, *, batch_size, seed, shard=0, num_shards=1, start=0) -> Iterator:
        step = start
        while True:
            random = np.random.default_rng((seed, step))
            x = random.normal(size=(batch_size, 2)).astype("f4")
            y = (x @ np.array([2.0, -1.0], "f4") + 0.5).astype("f4")
            if step == self.nan_at:
                y[0] = np.nan
            weights = random.integers(0, 3, batch_size).astype("f4")
            weights[0] = 1
            rows = slice(shard * batch_size // num_shards, (shard + 1) * batch_size // num_shards)
            yield {"x": x[rows], "y": y[rows], "weights": weights[rows]}
            step += 1

    def epoch_batches(self, *, batch_size, shard=0, num_shards=1):
        rows = self.batches(batch_size=batch_size, seed=0, shard=shard, num_shards=num_shards)
        return itertools.islice(rows, 1)

    def epochs(self, num_examples):
        return {"points": num_examples / 100}


def make_run(**changes) -> Run:
    """A run of 10 steps over it."""
    fields = {
        "task": Linear(),
        "optimizer": optax.adam(0.1),
        "data": Points(),
        "steps": 10,
        "batch_size": 16,
        "save_every": 4,
        "log_every": 1,
    }
    return Run(**{**fields, **changes})
