"""Checkpoints as they lie on disk: found, read array by array, verified and compared.

Nothing here needs the run or its mesh, and no more of an array is held than asked for: a block of
it at a time, or the parts of this process's devices.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.core import ASIDE, CARRY
from lmjax.engine import manifest
from lmjax.engine.manifest import Damaged
from lmjax.errors import UserError
from lmjax.ops.checksum import checksum

BLOCK_BYTES = 2**27  # of an array, read at once; as many as AHEAD of them are under way
AHEAD = 4
UNDER_WAY_BYTES = 2**32  # read and not yet on a device, when arrays are restored
AVERAGE = "averaged_params"  # the name of parameters averaged in training, in `opt_state`

UNREADABLE = ".unreadable"  # ends the name of a checkpoint that was set aside
REASON = "reason.txt"  # lies in it

_sum = jax.jit(checksum)


@dataclass(frozen=True)
class Stored:
    """A checkpoint's folder; `Stored.manifest()` raises Damaged where it is not whole."""

    folder: Path

    @property
    def name(self) -> str:
        """The name of its folder: the step, except where somebody moved it."""
        return self.folder.name

    def manifest(self) -> dict[str, Any]:
        """See `engine.manifest.read`."""
        return manifest.read(self.folder)

    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    def array(self, path: str) -> Any:
        """One of its arrays, to be read by slices: a `tensorstore.TensorStore`.

        Raises Damaged where it cannot be opened.
        """
        import tensorstore

        base = {"driver": "file", "path": f"{self.folder / 'state'}/"}
        store = {
            "driver": "ocdbt",
            "base": base,
            "path": path.replace("/", ".") + "/",
            "cache_pool": "cache_pool#ocdbt",
        }
        spec = {
            "driver": "zarr",
            "kvstore": store,
            "recheck_cached_data": False,
            "fill_missing_data_reads": False,
        }
        with _explained(f"{path} cannot be opened"):
            return tensorstore.open(spec, open=True, read=True, context=self._context).result()

    @functools.cached_property
    def _context(self) -> Any:
        """Keeps the directory of the arrays in memory, once for all of them."""
        import tensorstore

        return tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 2**25}})

    def blocks(self, path: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """An array in blocks of `BLOCK_BYTES`, in whole chunks of the file: (where, block).

        Raises Damaged where one cannot be read.
        """
        array = self.array(path)
        chunk = tuple(array.chunk_layout.read_chunk.shape or ())
        size = _block(array.shape, chunk, BLOCK_BYTES // array.dtype.numpy_dtype.itemsize)
        under_way: collections.deque[Any] = collections.deque()
        cuts = _grid(array.shape, size)
        while True:
            for cut in itertools.islice(cuts, AHEAD - len(under_way)):
                under_way.append((tuple(c.start for c in cut), array[cut].read()))
            if not under_way:
                return
            start, future = under_way.popleft()
            with _explained(f"{path} cannot be read"):
                block = np.asarray(future.result())
            yield start, block

    def read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by path, with the shardings of `wanted`; numpy's where it names none.

        Each process reads what its devices hold, each part once, and has no more than
        `UNDER_WAY_BYTES` (or one part) on the way to them. Raises Damaged.
        """
        found: dict[str, Any] = {}
        parts: dict[str, list[jax.Array]] = {path: [] for path in wanted}
        under_way: collections.deque[tuple[str, list[jax.Device], int, Any]] = collections.deque()
        held = 0

        def land() -> int:
            path, devices, size, future = under_way.popleft()
            with _explained(f"{path} cannot be read"):
                part = np.asarray(future.result())
            # The part is let go of only once it has arrived.
            parts[path] += jax.block_until_ready([jax.device_put(part, d) for d in devices])
            if not devices:
                found[path] = part
            return size

        for path, x in wanted.items():
            array = self.array(path)
            for index, devices in _parts(tuple(array.shape), x.sharding).items():
                cut = tuple(slice(*ends) for ends in index)
                size = math.prod(c.stop - c.start for c in cut) * array.dtype.numpy_dtype.itemsize
                while under_way and held + size > UNDER_WAY_BYTES:
                    held -= land()
                under_way.append((path, devices, size, array[cut].read()))
                held += size
        while under_way:
            land()
        for path, x in wanted.items():
            if x.sharding is not None:
                found[path] = jax.make_array_from_single_device_arrays(
                    tuple(x.shape), x.sharding, parts[path]
                )
        return found


def variables(paths: Iterable[str], *, aside: bool = False) -> dict[str, str]:
    """Which arrays of a state are the variables that inference needs: by the variable's path.

    Of parameters that were averaged in training, the average; what rows of training carry is none,
    and neither is what a task has beside its model (`core.ASIDE`), unless with `aside`.
    """
    paths, found = list(paths), {}
    for path in paths:
        kind, _, name = path.partition("/")
        if kind in ("params", "frozen"):
            found[f"params/{name}"] = path
        elif kind == "model_state" and not name.startswith(f"{CARRY}/"):
            found[name] = path
    averages = [path for path in paths if f"/{AVERAGE}/" in path]
    for path in averages:
        before, _, name = path.partition(f"/{AVERAGE}/")
        if before == averages[0].partition(f"/{AVERAGE}/")[0]:
            found[f"params/{name}"] = path
    left_out = "" if aside else f"params/{ASIDE}/"
    return {k: path for k, path in found.items() if not (left_out and k.startswith(left_out))}


def verify(stored: Stored) -> list[str]:
    """Reads every array of a checkpoint; what is bad of it, as sentences: none if it is whole."""
    try:
        arrays = stored.manifest()["arrays"]
    except (Damaged, UserError) as error:
        return [str(error)]
    problems = []
    for path, wanted in arrays.items():
        try:
            array = stored.array(path)
            shape, dtype = list(array.shape), array.dtype.numpy_dtype.name
            if (shape, dtype) != (wanted["shape"], wanted["dtype"]):
                was = f"{wanted['dtype']}{wanted['shape']}"
                problems.append(f"{path} is {dtype}{shape}, and was saved as {was}")
                continue
            total = np.zeros(2, np.uint32)
            for start, block in stored.blocks(path):
                total += np.asarray(_sum(block, np.asarray(start, np.uint32)))
            if manifest.in_text(total) != wanted["checksum"]:
                problems.append(f"{path} has not the checksum that it was saved with")
        except Damaged as error:
            problems.append(str(error))
    return problems


def difference(one: Stored, other: Stored, path: str) -> float:
    """The greatest absolute difference of an array that has the same shape in both.

    Where one has NaN, or another infinity than the other, it is NaN. Raises Damaged.
    """
    found, array = 0.0, other.array(path)
    for start, block in one.blocks(path):
        cut = tuple(slice(i, i + n) for i, n in zip(start, block.shape, strict=True))
        with _explained(f"{path} cannot be read"):
            second = np.asarray(array[cut].read().result())
        with np.errstate(invalid="ignore"):
            apart = np.abs(block.astype(np.float64) - second.astype(np.float64))
        found = np.maximum(found, np.where(block == second, 0, apart).max())  # NaN stays NaN
    return float(found)


def find(path: str | Path, step: int | None = None, *, none: bool = False) -> list[Stored]:
    """The checkpoints that `path` means, oldest first: a workdir, its `checkpoints` folder, or one.

    With `step`, the one of that step. Raises UserError where there is none, unless `none` will do.
    """
    given, root = Path(path), root_of(path)
    if root != given and given.parent == root:
        found = [Stored(given)]
    else:
        folders = [p for p in root.iterdir() if p.is_dir() and p.name.isdigit()]
        found = [Stored(p) for p in sorted(folders, key=lambda p: int(p.name))]
    chosen = [s for s in found if step is None or s.name == str(step)]
    if not chosen and not none:
        there = ", ".join(s.name for s in found) or "none"
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{given} has no {what}; there are: {there}.")
    return chosen


def root_of(path: str | Path) -> Path:
    """The folder of the checkpoints that `path` means. Raises UserError where it is no folder."""
    given = Path(path)
    if not given.is_dir():
        raise UserError(f"{given} is no folder: name a workdir or a checkpoint.")
    if (given / "state").is_dir() or (given / "about").is_dir():
        return given.parent
    return given / "checkpoints" if (given / "checkpoints").is_dir() else given


def set_aside(root: Path) -> list[tuple[str, str]]:
    """The checkpoints that were set aside: (name of the folder, why)."""
    found = []
    for folder in sorted(root.glob(f"*{UNREADABLE}")):
        reason = folder / REASON
        text = reason.read_text(errors="replace").strip() if reason.exists() else "unknown why"
        found.append((folder.name, text))
    return found


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what tensorstore raises, which is of many kinds, into Damaged."""
    try:
        yield
    except Exception as error:
        if "PERMISSION_DENIED" in str(error):
            raise PermissionError(f"{what}: {first_line(error)}") from error
        raise Damaged(f"{what}: {first_line(error)}") from error


def _parts(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """The parts of an array that this process holds, as (start, stop), and its devices that do."""
    if sharding is None:
        return {tuple((0, n) for n in shape): []}
    found: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ends = (cut.indices(n)[:2] for cut, n in zip(index or (), shape, strict=True))
        found.setdefault(tuple(ends), []).append(device)
    return found


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.partition(" [tensorstore_spec")[0][:300]


def _block(shape: Sequence[int], chunk: Sequence[int], size: int) -> tuple[int, ...]:
    """The shape of blocks: as many whole chunks as `size` elements hold, the last axes first."""
    block = list(chunk)
    for axis in reversed(range(len(shape))):
        times = max(1, size // max(1, math.prod(block)))
        block[axis] = min(block[axis] * times, max(1, shape[axis]))
    return tuple(block)


def _grid(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cuts an array into blocks of this shape; those at the ends may be smaller."""
    for corner in itertools.product(*(range(0, n, b) for n, b in zip(shape, block, strict=True))):
        ends = (min(c + b, n) for c, b, n in zip(corner, block, shape, strict=True))
        yield tuple(slice(c, e) for c, e in zip(corner, ends, strict=True))
