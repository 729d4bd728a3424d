"""What each process of the memory test in test_checkpoint.py runs: restores its half of a state.

Prints by how many bytes its memory grew at its peak, and whether the values are those saved.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.engine import checkpoint, distributed, stored
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.processes import processes_from
from lmjax.sharding import Layout

COUNT, SHAPE = 56, (2048, 2048)  # arrays of 16 MB
CHUNK_BYTES, UNDER_WAY_BYTES = 2**21, 2**25  # as small beside them as in large runs


def value(index):
    return np.full(SHAPE, index, np.float32) + np.arange(SHAPE[1], dtype=np.float32)


def save(folder):
    """From one device, so that every file holds parts of both halves; and one array, for itself."""
    checkpoint.CHUNK_BYTES = CHUNK_BYTES
    for name, count in (("one", 1), ("all", COUNT)):
        checkpoints = Checkpoints(Path(folder) / name)
        checkpoints.save(1, {f"x{i}": jax.numpy.asarray(value(i)) for i in range(count)}, {})
        checkpoints.close()


def memory(field):
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def main(folder):
    jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
    distributed.connect(processes_from(), timeout_s=60)
    stored.UNDER_WAY_BYTES = UNDER_WAY_BYTES
    mesh = Layout(data=1, fsdp=2).mesh()
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    abstract = {
        f"x{i}": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=split) for i in range(COUNT)
    }

    def restore(name, wanted):
        return Checkpoints(Path(folder) / name).restore(wanted, lambda about: None)[1]

    restore("one", {"x0": abstract["x0"]})  # what is loaded and compiled once is no part of it
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    state = restore("all", abstract)
    print(f"peak {memory('VmHWM') - before} of {COUNT * SHAPE[0] * SHAPE[1] * 4}")
    for i in range(COUNT):
        for shard in state[f"x{i}"].addressable_shards:
            np.testing.assert_array_equal(shard.data, value(i)[shard.index])
    distributed.disconnect()


if __name__ == "__main__":
    main(sys.argv[1])
