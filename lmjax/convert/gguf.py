"""GGUF files, of llama.cpp: their metadata and tensors, read by rows and written.

Source: the format as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes it, and
`quantize_row_q8_0_ref` and `dequantize_row_*` of ggml-quants.c. A block is 32 elements of a row.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from lmjax.convert.shards import Out
from lmjax.errors import UserError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32
# number: (name, elements of a block, bytes of a block)
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", BLOCK, 18),
    3: ("Q4_1", BLOCK, 20),
    8: ("Q8_0", BLOCK, 34),
    30: ("BF16", 1, 2),
}
# How a value of the metadata lies in the file, by the number of its type.
_PLAIN = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_LARGEST = 2**24  # of any count in a file: more than the largest vocabulary


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file; quantised ones are read as float32."""

    file: Path
    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what `rows` gives."""
        name = KINDS[self.kind][0]
        known = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
        return known.get(name, np.dtype(np.float32))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of its first axis, in the file."""
        _, elements, size = KINDS[self.kind]
        return math.prod(self.shape[1:]) // elements * size

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, dequantised."""
        begin, count = self.offset + start * self.row_bytes, (stop - start) * self.row_bytes
        if len(self.shape) == 1 and KINDS[self.kind][1] > 1:  # a vector in blocks: read it whole
            begin, count = self.offset, math.prod(self.shape) // BLOCK * KINDS[self.kind][2]
        data = np.fromfile(self.file, np.uint8, count, offset=begin)
        if data.size != count:
            raise UserError(f"{self.file} became shorter while {self.name!r} was read.")
        found = dequantize(data, self.kind)
        if found.size != (stop - start) * math.prod(self.shape[1:]):
            found = found[start:stop]
        return found.reshape(stop - start, *self.shape[1:])


def dequantize(data: np.ndarray, kind: int) -> np.ndarray:
    """The elements of bytes of a kind, as a vector: float32, or what the file has unquantised."""
    name, _, size = KINDS[kind]
    if name == "F32":
        return data.view(np.float32)
    if name in ("F16", "BF16"):
        return data.view(np.float16 if name == "F16" else ml_dtypes.bfloat16)
    blocks = data.reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if name == "Q8_0":
        return (blocks[:, 2:].view(np.int8).astype(np.float32) * scale).reshape(-1)
    packed = blocks[:, -BLOCK // 2 :]
    numbers = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    if name == "Q4_0":
        return ((numbers - 8) * scale).reshape(-1)
    least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    return (numbers * scale + least).reshape(-1)


def quantize_q8_0(x: np.ndarray) -> np.ndarray:
    """The bytes of Q8_0 of float32 elements: a scale in float16 and 32 signed bytes a block."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = blocks * np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    rounded = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)  # halves away from 0
    found = np.empty((len(blocks), 34), np.uint8)
    found[:, :2] = scale.astype(np.float16).view(np.uint8)
    found[:, 2:] = rounded.astype(np.int8).view(np.uint8)
    return found.reshape(-1)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata and the tensors of a file, by name; reads no tensor.

    Raises UserError where it is none, is truncated, or holds a tensor of a kind that we lack.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            return _read(path, file, size)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}.") from error
    except (struct.error, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no whole GGUF file: {error}. Download it again.") from error


def _read(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if (magic := file.read(4)) != MAGIC:
        raise ValueError(f"it begins with {magic!r}")
    version, num_tensors, num_fields = _unpack(file, "IQQ")
    if version not in (2, VERSION):
        raise UserError(f"{path} is GGUF version {version}, and 2 and {VERSION} can be read.")
    if max(num_tensors, num_fields) > _LARGEST:
        raise ValueError(f"it claims {num_tensors} tensors and {num_fields} fields")
    fields = {}
    for _ in range(num_fields):
        name = _string(file)
        (kind,) = _unpack(file, "I")
        fields[name] = _value(file, kind)
    infos = []
    for _ in range(num_tensors):
        name = _string(file)
        (rank,) = _unpack(file, "I")
        if rank > 8:
            raise ValueError(f"its tensor {name!r} has {rank} axes")
        shape = tuple(reversed(_unpack(file, f"{rank}Q")))
        infos.append((name, shape, *_unpack(file, "IQ")))
    alignment = int(fields.get("general.alignment", ALIGNMENT)) or ALIGNMENT
    start = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in infos:
        if kind not in KINDS:
            known = ", ".join(known for known, _, _ in KINDS.values())
            raise UserError(
                f"{path}: its tensor {name!r} is of ggml's type {kind}, and only {known} can be "
                "read. Convert it with llama-quantize --allow-requantize IN OUT Q8_0."
            )
        _, elements, block_bytes = KINDS[kind]
        if shape and shape[-1] % elements:
            raise ValueError(f"its tensor {name!r} of {list(shape)} is not whole blocks")
        end = start + offset + math.prod(shape) // elements * block_bytes
        if end > size:
            raise UserError(
                f"{path} is truncated: its tensor {name!r} ends at byte {end}, and the file at "
                f"{size}. Download it again."
            )
        tensors[name] = GgufTensor(path, name, kind, shape, start + offset)
    return fields, tensors


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    if length > _LARGEST:
        raise ValueError(f"a text of it has {length} bytes")
    data = file.read(length)
    if len(data) != length:
        raise ValueError("it ends within a text")
    return data.decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind in _PLAIN:
        return _unpack(file, _PLAIN[kind])[0]
    if kind != _ARRAY or depth > 4:
        raise ValueError(f"a field of it has the type {kind}")
    member, count = _unpack(file, "IQ")
    if count > _LARGEST:
        raise ValueError(f"a field of it has {count} members")
    if member in _PLAIN:
        return list(_unpack(file, f"{count}{_PLAIN[member]}"))
    return [_value(file, member, depth + 1) for _ in range(count)]


def write_gguf(
    path: Path, fields: Mapping[str, Any], tensors: Sequence[Out], *, q8_0: bool = False
) -> None:
    """Writes a file, tensor after tensor: F32, or Q8_0 for matrices whose rows are whole blocks.

    Args:
      path: of the file.
      fields: str, int (as uint32; in lists int32), float (as float32), bool, and lists of one kind.
      tensors: by llama.cpp's names.
      q8_0: quantise the matrices.
    """
    kinds = [8 if q8_0 and len(t.shape) > 1 and t.shape[-1] % BLOCK == 0 else 0 for t in tensors]
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields)))
    for name, value in fields.items():
        head += _packed_string(name) + _packed(value)
    offset, sizes = 0, []
    for tensor, kind in zip(tensors, kinds, strict=True):
        _, elements, block_bytes = KINDS[kind]
        head += _packed_string(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", kind, offset)
        sizes.append(math.prod(tensor.shape) // elements * block_bytes)
        offset += -(-sizes[-1] // ALIGNMENT) * ALIGNMENT
    head += b"\0" * (-len(head) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(head)
        for tensor, kind, size in zip(tensors, kinds, sizes, strict=True):
            written = sum(file.write(data) for data in _bytes(tensor.blocks(), kind))
            assert written == size, tensor.name
            file.write(b"\0" * (-size % ALIGNMENT))


def _bytes(blocks: Iterator[np.ndarray], kind: int) -> Iterator[memoryview]:
    for block in blocks:
        x = np.ascontiguousarray(block, np.float32).reshape(-1)
        yield (quantize_q8_0(x) if kind else x.view(np.uint8)).data


def _packed_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(value: Any) -> bytes:
    """A value with the number of its type."""
    if isinstance(value, list):
        kind = _kind(value[0]) if value else _STRING
        kind = _INT32 if kind == _UINT32 else kind
        body = b"".join(_packed_plain(item, kind) for item in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + body
    kind = _kind(value)
    return struct.pack("<I", kind) + _packed_plain(value, kind)


def _packed_plain(value: Any, kind: int) -> bytes:
    return _packed_string(value) if kind == _STRING else struct.pack(f"<{_PLAIN[kind]}", value)


def _kind(value: Any) -> int:
    kinds = {bool: _BOOL, int: _UINT32, float: _FLOAT32, str: _STRING}
    return kinds[type(value)]
