"""torch's .bin files: read without torch, and never run."""

import collections
import io
import os
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from lmjax.convert.pickles import read_bin
from lmjax.convert.weights import open_folder
from lmjax.errors import UserError
from tests.convert import folders
from tests.convert.folders import LLAMA

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


@pytest.fixture
def torch(monkeypatch):
    """The names that torch's pickles hold, for the pickler to find."""
    package, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in (*STORAGES.values(), "LongStorage"):
        setattr(package, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        exec(f"def {name}(*arguments): return arguments", utils.__dict__)
        getattr(utils, name).__module__ = "torch._utils"
    package._utils = utils
    monkeypatch.setitem(sys.modules, "torch", package)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return package


def save(path, torch, weights, *, strides=None, offset=0, reach=0, extra=None):
    """What torch.save writes of a state_dict: a zip of a pickle and of storages."""

    class Tensor:
        def __init__(self, key, array):
            self.key, self.array = key, array

        def __reduce__(self):
            array = self.array
            steps = [s // array.itemsize for s in array.strides] if strides is None else strides
            shape = (array.shape[0] + reach, *array.shape[1:])
            storage = Storage(self.key, array)
            arguments = (storage, offset, shape, tuple(steps), False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Storage:
        def __init__(self, key, array):
            self.key, self.array = key, array

    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            if isinstance(x, Storage):
                kind = getattr(torch, STORAGES.get(x.array.dtype.name, "LongStorage"))
                return ("storage", kind, x.key, "cpu", x.array.size)
            return None

    tree = collections.OrderedDict(
        (name, Tensor(str(i), array)) for i, (name, array) in enumerate(weights.items())
    )
    data = io.BytesIO()
    Pickler(data, protocol=2).dump(tree | (extra or {}))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", data.getvalue())
        archive.writestr("model/byteorder", b"little")
        for i, array in enumerate(weights.values()):
            archive.writestr(f"model/data/{i}", array.tobytes())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_folder_of_bin_files(tmp_path, torch, dtype):
    weights = folders.drawn(LLAMA, dtype)
    folder = folders.write(tmp_path / "in", LLAMA, weights)
    (folder / "model.safetensors").unlink()
    save(folder / "pytorch_model.bin", torch, weights)
    found = open_folder(folder)
    assert found.tensors.keys() == weights.keys()
    for name, array in weights.items():
        rows = found.tensors[name].rows(0, len(array))
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, array)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((os.system, "touch {}"), "(posix|nt).system"),
        ((eval, "open('{}', 'w')"), "__builtin__.eval"),
        ((getattr, collections, "abc"), "__builtin__.getattr"),
    ],
)
def test_code_is_refused_and_not_run(tmp_path, torch, call, named):
    trap, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    call = tuple(x.format(trap) if isinstance(x, str) else x for x in call)
    if call[0] is getattr:
        call = (getattr, "text", "upper")
    save(path, torch, {"a": np.ones((2, 2), np.float32)}, extra={"b": Evil(*call)})
    with pytest.raises(UserError, match=rf"is refused: its pickle names {named}, which no weights"):
        read_bin(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reach": 1}, r"'a' needs 32 bytes of the storage '0', which has 24"),
        ({"offset": 1}, r"'a' needs 28 bytes of the storage '0', which has 24"),
        ({"strides": (1, 3)}, "'a' does not lie contiguously"),
        ({"strides": (-2, 1)}, "is no whole file of torch.save"),
        ({"extra": {"epoch": 3}}, "'epoch' is no tensor"),
    ],
)
def test_tensors_that_are_none(tmp_path, torch, change, message):
    path = tmp_path / "model.bin"
    save(path, torch, {"a": np.ones((3, 2), np.float32)}, **change)
    with pytest.raises(UserError, match=message):
        read_bin(path)


@pytest.mark.parametrize("length", [0, 50, 400, -30])
def test_truncated_files(tmp_path, torch, length):
    path = tmp_path / "model.bin"
    save(path, torch, {"a": np.ones((30, 20), np.float32)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"is no whole file of torch\.save"):
        read_bin(path)


def test_an_old_pickle_without_its_zip(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"is no whole file of torch.save \(since PyTorch 1.6\)"):
        read_bin(path)


@pytest.mark.slow
def test_files_of_torch_itself(tmp_path):
    torch = pytest.importorskip("torch")
    made = {"a": torch.randn(3, 5), "b": torch.nn.Parameter(torch.randn(7).bfloat16())}
    made["c"] = made["a"][1:]
    torch.save(made, tmp_path / "model.bin")
    found = read_bin(tmp_path / "model.bin")
    for name, x in made.items():
        rows = found[name].rows(0, len(x)).astype(np.float32)
        np.testing.assert_array_equal(rows, x.detach().float().numpy())
