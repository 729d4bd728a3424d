"""What each process of tests/test_many_hosts.py runs, and the run that they share.

A two-layer network, whose every mesh axis can go across processes; it compiles in no time.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from lmjax import sharding
from lmjax.core import Mean, Output
from lmjax.engine import distributed
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.loop import train
from lmjax.engine.processes import processes_from
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.sharding import Boxed, Layout
from tests.engine.linear_task import Linear, Points

WIDTH, HIDDEN = 64, 16


@dataclasses.dataclass(frozen=True)
class Network(Linear):
    """Weighted squared error of relu(x . into) . out."""

    def init(self, rng, batch):
        first, second = jax.random.split(rng)
        into = jax.random.normal(first, (WIDTH, HIDDEN)) / 8
        out = jax.random.normal(second, (HIDDEN,)) / 4
        return {"params": {"into": Boxed(into, ("embed", "mlp")), "out": Boxed(out, ("mlp",))}}

    def loss(self, variables, batch, rng, *, train):
        params = variables["params"]
        hidden = sharding.shard(jax.nn.relu(batch["x"] @ params["into"]), "batch", "act_mlp")
        error = hidden @ params["out"] - batch["y"]
        return Output(loss=Mean.of(error**2, batch["weights"]), metrics={})


@dataclasses.dataclass(frozen=True)
class Rows(Points):
    """Random rows, batch s a function of (seed, s); an epoch has 44, which no batch size divides.

    At step `broken_at`, one process finds its data unreadable. Where the variable PAUSE_S is set,
    it takes so long to read a batch.
    """

    broken_at: int = -1

    example: ClassVar = Points.example | {"x": jax.ShapeDtypeStruct((WIDTH,), np.float32)}

    def batches(self, *, batch_size, seed, shard=0, num_shards=1, start=0):
        rows = slice(shard * batch_size // num_shards, (shard + 1) * batch_size // num_shards)
        step = start
        while True:
            if step == self.broken_at and jax.process_index() == 1:
                raise RuntimeError("the disk of this host is gone")
            time.sleep(float(os.environ.get("PAUSE_S", 0)))
            random = np.random.default_rng((seed, step))
            x = random.normal(size=(batch_size, WIDTH)).astype("f4")
            weights = random.integers(0, 3, batch_size).astype("f4")
            yield {"x": x[rows], "y": np.sin(x[rows]).sum(1), "weights": weights[rows]}
            step += 1

    def epoch_batches(self, *, batch_size, shard=0, num_shards=1):
        total = -(-44 // batch_size) * batch_size
        x = np.random.default_rng(7).normal(size=(total, WIDTH)).astype("f4")
        whole = {"x": x, "y": np.cos(x).sum(1), "weights": np.float32(np.arange(total) < 44)}
        size = batch_size // num_shards
        for begin in range(shard * size, total, batch_size):
            yield {name: value[begin : begin + size] for name, value in whole.items()}


def make_run(layout, **changes) -> Run:
    """Ten steps, evaluated at the fifth and the last, saved at the sixth and the last."""
    fields = {
        "task": Network(),
        "optimizer": optax.adam(0.05),
        "data": Rows(),
        "steps": 10,
        "batch_size": 16,
        "layout": layout,
        "evals": {"valid": Losses(data=Rows(), batch_size=16)},
        "eval_every": 5,
        "save_every": 6,
        "log_every": 1,
    }
    return Run(**{**fields, **changes})


def leave_results(run, folder):
    """Trains in `folder`; keeps the rows that this process reads, and the whole parameters."""
    folder.mkdir(exist_ok=True)
    index = jax.process_index()
    shard, num_shards = distributed.local_rows(run.layout.mesh())
    batches = Rows().batches(batch_size=16, seed=0, shard=shard, num_shards=num_shards)
    np.savez(folder / f"rows{index}.npz", shard=[shard, num_shards], **next(batches))
    params = train(run, folder, quiet=True).params
    whole = jax.jit(lambda tree: tree, out_shardings=jax.tree.map(replicated, params))(params)
    np.savez(folder / f"params{index}.npz", **jax.device_get(whole))


def replicated(x):
    return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())


def cannot_read(step):
    """From now on the second process finds the checkpoint of this step torn."""
    read = Checkpoints._read

    def torn(self, wanted, abstract):
        if wanted == step and jax.process_index() == 1:
            raise ValueError("a block of it is lost")
        return read(self, wanted, abstract)

    Checkpoints._read = torn


def cannot_write(process):
    """From now on what this process, if it is the one, saves of a state does not reach the disk."""
    save = ocp.PyTreeCheckpointHandler.async_save

    class Full:
        def result(self, timeout=None):
            raise OSError("no space left on this host's disk")

    async def failing(self, *args, **arguments):
        futures = await save(self, *args, **arguments)
        return [*futures, Full()] if jax.process_index() == process else futures

    ocp.PyTreeCheckpointHandler.async_save = failing


def main(runs: dict, folder: Path) -> None:
    """Trains every named run (fields of Layout, and what is to go wrong), one after the other."""
    jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    distributed.connect(processes_from(), timeout_s=60)
    for name, fields in runs.items():
        changes = {"steps": fields.pop("steps", 10)}
        cannot_read(fields.pop("unreadable", -1))
        cannot_write(fields.pop("unwritable", -1))
        changes["data"] = Rows(broken_at=fields.pop("broken_at", -1))
        leave_results(make_run(Layout(**fields), **changes), folder / name)
    distributed.disconnect()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
