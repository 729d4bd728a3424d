"""Checkpoints as they lie on disk: read in parts, verified, compared, found."""

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.engine import checkpoint, stored
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.manifest import Damaged
from lmjax.engine.stored import Stored, difference, find, variables, verify
from lmjax.errors import UserError
from lmjax.sharding import Layout

SHAPES = {"params/big": (24, 10, 6), "params/small": (3,), "step": ()}


@pytest.fixture
def saved(tmp_path, devices, monkeypatch):
    """Steps 1 and 2 in chunks of at most 100 bytes, 2 x 2 devices; blocks of at most 900."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 100)
    monkeypatch.setattr(stored, "BLOCK_BYTES", 900)
    mesh = Layout(data=2, fsdp=2).mesh(devices[:4])
    checkpoints, states = Checkpoints(tmp_path / "checkpoints"), []
    for step in (1, 2):
        random = np.random.default_rng(step)
        host = {k: random.normal(size=s).astype("f4") for k, s in SHAPES.items()}
        if step == 2:
            host["params/small"] = states[0]["params/small"]
        states.append(host)
        split = {k: "fsdp" if "big" in k else None for k in host}
        state = {
            k: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[split[k]][: x.ndim])))
            for k, x in host.items()
        }
        checkpoints.save(step, unflatten_dict(state, sep="/"), {"config": {}})
    checkpoints.close()
    return tmp_path, states


def overwrite(path, array, index, value):
    """Writes another value, with which all that the file itself can be checked by agrees."""
    import tensorstore

    base = {"driver": "file", "path": f"{path / 'state'}/"}
    store = {"driver": "ocdbt", "base": base, "path": array.replace("/", ".") + "/"}
    opened = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
    opened[index].write(value).result()


def test_an_array_is_read_in_blocks_of_whole_chunks(saved):
    folder, states = saved
    (one, _) = find(folder)
    array = np.full(SHAPES["params/big"], np.nan, "f4")
    sizes = []
    for start, block in one.blocks("params/big"):
        cut = tuple(slice(i, i + n) for i, n in zip(start, block.shape, strict=True))
        assert np.isnan(array[cut]).all()
        array[cut] = block
        sizes.append(block.nbytes)
    np.testing.assert_array_equal(array, states[0]["params/big"])
    assert max(sizes) <= 900 and len(sizes) < 24 * 10 * 6 * 4 / 100
    assert [start for start, _ in one.blocks("step")] == [()]


def test_arrays_are_read_to_any_sharding(saved, devices, monkeypatch):
    monkeypatch.setattr(stored, "UNDER_WAY_BYTES", 500)
    folder, states = saved
    mesh = Layout(data=2, tensor=2, fsdp=2).mesh(devices)
    specs = {"params/big": ("tensor", None, "fsdp"), "params/small": (), "step": ()}
    wanted = {
        k: jax.ShapeDtypeStruct(s, "float32", sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for (k, s), spec in zip(SHAPES.items(), specs.values(), strict=True)
    }
    found = find(folder, 1)[0].read(wanted)
    for path, x in found.items():
        np.testing.assert_array_equal(x, states[0][path])
        assert x.sharding == wanted[path].sharding
    on_host = find(folder, 2)[0].read({"step": jax.ShapeDtypeStruct((), "float32")})
    assert isinstance(on_host["step"], np.ndarray) and on_host["step"] == states[1]["step"]


def test_a_value_that_only_the_checksum_contradicts(saved):
    folder, states = saved
    one, two = find(folder)
    assert verify(one) == verify(two) == []
    value = states[1]["params/big"][3, 4, 5]
    overwrite(two.folder, "params/big", (3, 4, 5), np.nextafter(value, np.float32(9)))
    assert verify(two) == ["params/big has not the checksum that it was saved with"]
    overwrite(two.folder, "params/big", (3, 4, 5), value)
    assert verify(two) == []


def test_what_verify_says_of_lost_files(saved):
    one, two = find(saved[0])
    for path in (two.folder / "state" / "d").iterdir():
        path.unlink()
    assert all("cannot be opened: NOT_FOUND" in text for text in verify(two))
    assert len(verify(two)) == 3
    with pytest.raises(Damaged, match="params/big cannot be opened"):
        two.read({"params/big": jax.ShapeDtypeStruct(SHAPES["params/big"], "float32")})
    (one.folder / "about" / "metadata").unlink()
    assert verify(one) == [
        "its manifest, about/metadata, cannot be read: [Errno 2] No such file or directory: "
        f"'{one.folder / 'about' / 'metadata'}'"
    ]


def test_the_greatest_difference(saved):
    folder, states = saved
    one, two = find(folder)
    for path in SHAPES:
        expected = np.max(np.abs(np.float64(states[0][path]) - np.float64(states[1][path])))
        assert difference(one, two, path) == expected
    assert difference(one, two, "params/small") == 0
    overwrite(two.folder, "params/small", 1, np.float32(np.nan))
    assert np.isnan(difference(one, two, "params/small"))


def test_where_the_variables_lie():
    paths = [
        "step",
        "params/a/b",
        "params/c",
        "frozen/d",
        "model_state/counts/n",
        "opt_state/0/mu/c",
    ]
    assert variables(paths) == {
        "params/a/b": "params/a/b",
        "params/c": "params/c",
        "params/d": "frozen/d",
        "counts/n": "model_state/counts/n",
    }
    average = [f"opt_state/3/averaged_params/{name}" for name in ("a/b", "c")]
    found = variables([*paths, *average])
    assert (found["params/a/b"], found["params/c"]) == tuple(average)
    assert found["params/d"] == "frozen/d"


def test_a_workdir_its_checkpoints_and_one_of_them_are_found(saved):
    folder = saved[0]
    root = folder / "checkpoints"
    assert [s.name for s in find(folder)] == [s.name for s in find(root)] == ["1", "2"]
    assert find(root / "2") == find(folder, 2) == [Stored(root / "2")]
    with pytest.raises(UserError, match="has no checkpoint of step 7; there are: 1, 2"):
        find(folder, 7)
    with pytest.raises(UserError, match="has no checkpoint; there are: none"):
        find(folder / "checkpoints" / "1" / "state")
    with pytest.raises(UserError, match="is no folder"):
        find(folder / "nowhere")
