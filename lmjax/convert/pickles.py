"""PyTorch's .bin files, read without running what is in them.

A pickle is a program that may call anything; here the only things it can name are the ten or so
that a plain dict of tensors needs, each in the place of which stands a function of this module.

Source: `torch.serialization`: a zip of `data.pkl` and, uncompressed, each tensor's storage.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.convert.shards import SIZES, FileTensor
from lmjax.errors import UserError

# Kinds of storages, as safetensors names them.
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
LARGEST_PICKLE = 2**28  # bytes: of names and shapes alone


@dataclass(frozen=True)
class _Kind:
    """Stands for a storage's class."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Elements of a kind in a member of the zip."""

    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class _View:
    """A tensor: where its elements lie in a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _View:
    del rest  # requires_grad, hooks
    numbers = (offset, *shape, *strides)
    sound = all(type(n) is int and n >= 0 for n in numbers) and len(shape) == len(strides)
    if not isinstance(storage, _Storage) or not sound:
        raise pickle.UnpicklingError("a tensor of it is no tensor")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    del rest
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _Kind(kind) for name, kind in _STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):  # that of Python: no number in a file makes it take memory
    def find_class(self, module: str, name: str) -> Any:
        """What stands in the place of a name; refuses all others."""
        if (module, name) not in _KNOWN:
            raise _Code(f"{module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, by ('storage', its class, key, device, elements)."""
        word, kind, key, _, count = pid
        known = isinstance(kind, _Kind) and isinstance(key, str) and type(count) is int
        if word != "storage" or not known or count < 0:
            raise pickle.UnpicklingError("a storage of it is no storage")
        return _Storage(kind.name, key, count)


class _Code(Exception):
    """A pickle names what no dict of tensors needs."""


def read_bin(path: Path) -> dict[str, FileTensor]:
    """The tensors of a .bin file, by name; reads none of their elements.

    Raises UserError where it is none, where it names code, and for a tensor that reaches beyond
    its file or does not lie contiguously.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            (name,) = (n for n in members if n.rpartition("/")[2] == "data.pkl")
            if members[name].file_size > LARGEST_PICKLE:
                raise ValueError(f"its pickle has {members[name].file_size} bytes")
            folder = name.removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in members and archive.read(order) != b"little":
                raise UserError(f"{path} was saved on a big-endian machine. Save it again.")
            tree = _Unpickler(io.BytesIO(archive.read(name))).load()
            if not isinstance(tree, Mapping):
                raise ValueError("its pickle is no dict of tensors")
            starts = {n: _start(archive, info) for n, info in members.items() if "/data/" in n}
    except _Code as error:
        raise UserError(
            f"{path} is refused: its pickle names {error}, which no weights need and which would "
            "be run by torch.load. Do not open it; get the model as safetensors."
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: a shard is missing. Download it again.") from error
    except UserError:
        raise
    except Exception as error:  # of a pickle that is damaged, any
        raise UserError(
            f"{path} is no whole file of torch.save (since PyTorch 1.6): {error!r}. Download it "
            "again, or save it as safetensors."
        ) from error
    found = {}
    for name, view in tree.items():
        if isinstance(view, _View) and isinstance(name, str):
            found[name] = _tensor(path, name, view, starts, f"{folder}data/")
        else:
            raise UserError(f"{path}: {name!r} is no tensor. Save model.state_dict() alone.")
    return found


def _start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(where the bytes of a member begin in the file, how many there are)."""
    if info.compress_type != zipfile.ZIP_STORED or archive.fp is None:
        raise ValueError(f"{info.filename} is compressed")
    archive.fp.seek(info.header_offset)
    header = archive.fp.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name + extra, info.file_size


def _tensor(
    path: Path, name: str, view: _View, starts: Mapping[str, tuple[int, int]], folder: str
) -> FileTensor:
    size = SIZES[view.storage.kind]
    wanted = [math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
    pairs = zip(view.shape, view.strides, wanted, strict=True)
    if not all(n == 1 or stride == contiguous for n, stride, contiguous in pairs):
        raise UserError(
            f"{path}: the tensor {name!r} does not lie contiguously. Save it as safetensors, "
            "which makes it so."
        )
    start, length = starts.get(f"{folder}{view.storage.key}", (0, -1))
    end = (view.offset + math.prod(view.shape)) * size
    if end > min(length, view.storage.count * size):
        raise UserError(
            f"{path} is damaged: its tensor {name!r} needs {end} bytes of the storage "
            f"{view.storage.key!r}, which has {max(length, 0)}. Download it again."
        )
    return FileTensor(path, name, view.storage.kind, view.shape, start + view.offset * size)
