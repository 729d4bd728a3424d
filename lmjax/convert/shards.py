"""safetensors files: read by rows without mapping them, checked whole beforehand, and written.

Source: the format as https://github.com/huggingface/safetensors describes it: eight bytes with the
length of a JSON header, the header (name -> dtype, shape, offsets), and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmjax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 10**8  # bytes, as the reference reader has it
FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SIZES = {  # bytes of an element, of every dtype that a file may hold
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class FileTensor:
    """A tensor that lies contiguously in a file; `kind` is its dtype as the file names it."""

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements; raises UserError for what is no weight."""
        if self.kind not in FLOATS:
            raise UserError(
                f"the tensor {self.name!r} of {self.file} is {self.kind}, and weights are expected "
                f"to be one of {', '.join(FLOATS)}. Convert it there, as "
                "model.to(torch.float32).save_pretrained(DIR)."
            )
        return FLOATS[self.kind]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop; a scalar has one row."""
        shape = (stop - start, *self.shape[1:])
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        found = np.fromfile(
            self.file, self.dtype, math.prod(shape), offset=self.offset + start * row
        )
        if found.size != math.prod(shape):
            raise UserError(f"{self.file} became shorter while {self.name!r} was read.")
        return found.reshape(shape)


def read_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file, by name; reads its header alone.

    Raises UserError where the file is none, or ends before its tensors do, or they overlap.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header of {length} bytes does not fit its {size}")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header holds no names")
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: a shard is missing. Download it again.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no whole safetensors file: {error}. Download it again."
        ) from error
    header.pop("__metadata__", None)
    found, end, begin = {}, 0, 8 + length
    entries = [(_entry(path, name, entry), name) for name, entry in header.items()]
    for (kind, shape, start, stop), name in sorted(entries, key=lambda e: (e[0][2], e[0][3])):
        if start != end:
            raise UserError(
                f"{path} is damaged: its tensor {name!r} begins at byte {start} of the data, and "
                f"the one before it ends at {end}. Download it again."
            )
        end = stop
        if begin + stop > size:
            raise UserError(
                f"{path} is truncated: its tensor {name!r} ends at byte {begin + stop}, and the "
                f"file at {size}. Download it again."
            )
        found[name] = FileTensor(path, name, kind, shape, begin + start)
    if begin + end != size:
        raise UserError(
            f"{path} is damaged: it has {size} bytes, and its tensors end at {begin + end}. "
            "Download it again."
        )
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    damaged = UserError(f"{path} is damaged: the header's entry of {name!r} is {entry!r:.200}.")
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        if not numbers or stop - start != SIZES[kind] * math.prod(shape):
            raise damaged
    except (KeyError, TypeError, ValueError) as error:
        raise damaged from error
    return kind, shape, start, stop


def read_folder(
    folder: Path,
    *,
    single: str = SINGLE,
    index: str = INDEX,
    read: Callable[[Path], dict[str, FileTensor]] = read_file,
) -> dict[str, FileTensor]:
    """The tensors of a folder's model, of all its shards; raises UserError as `read` does."""
    if not (folder / index).exists():
        suffix = Path(single).suffix
        files = [folder / single] if (folder / single).exists() else []
        files = files or sorted(folder.glob(f"*{suffix}"))
        if not files:
            raise UserError(f"{folder} has no *{suffix}.")
        if len(files) > 1:
            raise UserError(
                f"{folder} has {len(files)} files *{suffix} and no {index}, which would say that "
                "they are shards of one model. Download it, or leave one file."
            )
        return read(files[0])
    try:
        names: dict[str, str] = json.loads((folder / index).read_text("utf-8"))["weight_map"]
        sound = all(isinstance(f, str) and Path(f).name == f for f in names.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / index} is damaged: {error}. Download it again.") from error
    if not sound:
        raise UserError(f"{folder / index} is damaged: a shard is to be a file of this folder.")
    shards = {file: read(folder / file) for file in sorted(set(names.values()))}
    for name, file in names.items():
        if name not in shards[file]:
            raise UserError(
                f"{folder / file} lacks the tensor {name!r}, which {index} says it holds. "
                "Download both again."
            )
    return {name: shards[file][name] for name, file in names.items()}


@dataclass(frozen=True)
class Out:
    """A tensor that is to be written: its blocks of rows are made when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_folder(folder: Path, tensors: Sequence[Out], *, shard_bytes: int) -> list[Path]:
    """Writes tensors as shards of at most so many bytes (or one tensor), with their index."""
    shards: list[list[Out]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return [folder / SINGLE]
    paths: list[Path] = []
    names: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        paths.append(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        write_file(paths[-1], members)
        names |= {tensor.name: paths[-1].name for tensor in members}
    index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return paths


def write_file(path: Path, tensors: Sequence[Out]) -> None:
    """Writes one safetensors file, tensor after tensor."""
    names = {value: key for key, value in FLOATS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        ends = [offset, offset + tensor.size]
        shape = list(tensor.shape)
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": ends}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written = sum(_write(file, block, tensor.dtype) for block in tensor.blocks())
            assert written == tensor.size, tensor.name


def _write(file: Any, block: np.ndarray, dtype: np.dtype[Any]) -> int:
    block = np.ascontiguousarray(block, dtype)
    return int(file.write(block.reshape(-1).view(np.uint8).data))
