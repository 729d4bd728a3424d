"""A checkpoint written block by block, of arrays that are never whole in memory nor on devices.

It is one as `engine.checkpoint` reads it, of parameters alone. While a block is made, those before
it are summed, written and brought to the disk.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.engine import manifest
from lmjax.errors import UserError
from lmjax.ops.checksum import checksum

UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of a folder that is no checkpoint yet
CHUNK_BYTES = 2**23  # of a file's chunks, written one by one
SUM_BYTES = 2**21  # summed at once, for which XLA holds some six times as much
UNDER_WAY = 3  # chunks that are being written
SMALL_BYTES = 2**25  # of a block beside which the next one is made

Blocks = Iterable[tuple[Sequence[int], np.ndarray]]

_sum = jax.jit(checksum)


def write_checkpoint(
    directory: Path,
    step: int,
    arrays: Mapping[str, jax.ShapeDtypeStruct],
    blocks: Callable[[str], Blocks],
    about: Mapping[str, Any],
) -> Path:
    """Writes checkpoint `step` under `directory` and returns its folder.

    Args:
      directory: the `checkpoints` folder; made if it is not there.
      step: its name.
      arrays: shapes and dtypes by path, as 'params/blocks/mlp/up'.
      blocks: path -> (where it begins, block), which together are the array, each element once;
        all but those at its ends have the shape of the first, and begin at multiples of that.
      about: see `engine.manifest.describe`.

    Raises:
      UserError: where there is a checkpoint of that step.
    """
    folder, unfinished = directory / str(step), directory / f"{step}{UNFINISHED}"
    if folder.exists():
        raise UserError(f"{directory} has a checkpoint of step {step}: give another --workdir.")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "state").mkdir(parents=True)
    entries = _write(unfinished / "state", arrays, blocks)
    (unfinished / "about").mkdir()
    device = jax.devices()[0]
    mesh = {"axes": {}, "devices": 1, "kind": device.device_kind, "processes": 1}
    described = manifest.seal(about, step, entries, mesh)
    (unfinished / "about" / "metadata").write_text(json.dumps(described))
    _sync(unfinished, set())
    unfinished.rename(folder)
    _sync_one(directory)
    return folder


def _write(
    state: Path, arrays: Mapping[str, jax.ShapeDtypeStruct], blocks: Callable[[str], Blocks]
) -> dict[str, dict[str, Any]]:
    """Writes the arrays and returns the manifest's entries of them."""
    import tensorstore

    # Each file is synced below, beside other work, rather than by the thread that writes it.
    context = tensorstore.Context({"file_io_sync": False})
    writing: collections.deque[Any] = collections.deque()
    summing: collections.deque[Any] = collections.deque()
    syncing: collections.deque[Any] = collections.deque()
    sums: dict[str, list[Any]] = {path: [] for path in arrays}
    synced: set[Path] = set()
    with ThreadPoolExecutor(1) as summer, ThreadPoolExecutor(1) as syncer:
        for path, x in arrays.items():
            array: Any = None
            for start, block in blocks(path):
                assert block.dtype == x.dtype, f"{path}: {block.dtype} for {x.dtype}"
                if array is None:
                    chunk = chunk_of(block.shape, block.dtype, CHUNK_BYTES)
                    array = _create(state, path, x, chunk, context)
                summing.append(summer.submit(_checksum, block, start))
                sums[path].append(summing[-1])
                for cut in _chunks(block.shape, chunk):
                    _settle(writing, UNDER_WAY)
                    place = tuple(
                        slice(s + c.start, s + c.stop) for s, c in zip(start, cut, strict=True)
                    )
                    # Nobody writes to a block once it is given.
                    writing.append(
                        array[place].write(block[cut], can_reference_source_data_indefinitely=True)
                    )
                small = block.nbytes <= SMALL_BYTES
                del block  # before the next is made
                _settle(summing, 1 if small else 0)
                _settle(writing, UNDER_WAY if small else 0)
            syncing.append(syncer.submit(_sync, state, synced))
        _settle(writing, 0)
        syncing.append(syncer.submit(_sync, state, synced))
        _settle(syncing, 0)
    zero = np.zeros(2, np.uint32)
    return {
        path: {
            "shape": list(x.shape),
            "dtype": np.dtype(x.dtype).name,
            "checksum": manifest.in_text(sum((s.result() for s in sums[path]), zero)),
        }
        for path, x in arrays.items()
    }


def _settle(futures: collections.deque[Any], count: int) -> None:
    """Waits until no more than so many are under way."""
    while len(futures) > count:
        futures.popleft().result()


def _sync(folder: Path, synced: set[Path]) -> None:
    """Brings the files of a folder to the disk, and adds them to those that are there already.

    A file of tensorstore's does not change once it has its name, but for the manifest.
    """
    for path in sorted(folder.rglob("*")):
        if path not in synced and not path.name.endswith(".__lock"):
            _sync_one(path)
            if path.parent.name == "d":
                synced.add(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    try:
        opened = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # it has got another name meanwhile
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _create(
    state: Path, path: str, x: jax.ShapeDtypeStruct, chunk: Sequence[int], context: Any
) -> Any:
    import tensorstore

    base = {"driver": "file", "path": f"{state}/"}
    name = path.replace("/", ".") + "/"
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": name},
        "metadata": {"chunks": list(chunk), "compressor": None},
        "store_data_equal_to_fill_value": True,
    }
    return tensorstore.open(
        spec, create=True, dtype=np.dtype(x.dtype), shape=list(x.shape), context=context
    ).result()


def _checksum(block: np.ndarray, begin: Sequence[int]) -> np.ndarray:
    total = np.zeros(2, np.uint32)
    for cut in _chunks(block.shape, chunk_of(block.shape, block.dtype, SUM_BYTES)):
        start = [b + c.start for b, c in zip(begin, cut, strict=True)]
        # A copy: jax may hold on to what it is given until it is called again.
        total += np.asarray(_sum(block[cut].copy(), np.asarray(start, np.uint32)))
    return total


def chunk_of(shape: Sequence[int], dtype: np.dtype[Any], num_bytes: int) -> tuple[int, ...]:
    """The shape of a part of a block: whole but for its first axes, if it exceeds `num_bytes`."""
    chunk = list(shape)
    for axis, size in enumerate(shape):
        row = dtype.itemsize * math.prod(shape[axis + 1 :])
        chunk[axis] = max(1, min(size, num_bytes // max(1, row)))
        if row <= num_bytes:
            break
    return tuple(chunk)


def _chunks(shape: Sequence[int], chunk: Sequence[int]) -> Iterable[tuple[slice, ...]]:
    steps = (range(0, n, c) for n, c in zip(shape, chunk, strict=True))
    for corner in itertools.product(*steps):
        ends = zip(corner, chunk, shape, strict=True)
        yield tuple(slice(c, min(c + b, n)) for c, b, n in ends)
