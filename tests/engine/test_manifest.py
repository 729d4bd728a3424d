"""What a manifest says, and every way in which one can be damaged or of another kind."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.engine import manifest
from lmjax.engine.manifest import Damaged
from lmjax.errors import UserError
from lmjax.sharding import Layout

ABOUT = {"config": {"steps": 4, "rate": 0.1}, "tokenizer": "abc", "data": {"left_out": (3,)}}


@pytest.fixture
def state(devices):
    mesh = Layout(data=2, fsdp=4).mesh(devices)
    kernel = np.random.default_rng(0).normal(size=(8, 4)).astype("f4")
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    return {
        "step": jnp.asarray(4),
        "params": {"kernel": jax.device_put(kernel, split), "half": jnp.ones(3, jnp.bfloat16)},
        "nothing": None,
    }


def write(folder, text):
    (folder / "about").mkdir(parents=True, exist_ok=True)
    (folder / "about" / "metadata").write_text(text)
    return folder


def test_it_says_what_was_saved_and_by_what(state, tmp_path):
    held = manifest.describe(ABOUT, 4, state)
    assert held["config"] == ABOUT["config"] and held["data"] == {"left_out": [3]}
    assert held["tokenizer_sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert list(held["arrays"]) == ["params/half", "params/kernel", "step"]
    assert held["arrays"]["params/kernel"]["shape"] == [8, 4]
    assert held["arrays"]["params/half"]["dtype"] == "bfloat16"
    assert held["versions"]["jax"] == jax.__version__
    assert held["versions"].keys() >= {"python", "flax", "optax", "orbax-checkpoint", "lmjax"}
    assert held["mesh"]["axes"]["fsdp"] == 4 and held["mesh"]["devices"] == 8
    assert held["time"].endswith("Z") and held["step"] == 4
    assert manifest.read(write(tmp_path / "4", json.dumps(held, indent=2))) == held
    assert manifest.abstract(held, "params/half").dtype == jnp.bfloat16


def test_checksums_are_no_function_of_the_mesh_and_tell_what_is_damaged(state):
    held = manifest.describe(ABOUT, 4, state)
    on_host = jax.device_get(state)
    assert manifest.checksums(on_host) == manifest.checksums(state)
    assert manifest.damaged(held, on_host) == []
    kernel = on_host["params"]["kernel"].copy()
    kernel.view(np.uint32)[5, 2] ^= 1
    on_host["params"]["kernel"] = kernel
    assert manifest.damaged(held, on_host) == ["params/kernel"]


@pytest.mark.parametrize("seed", range(8))
def test_any_flipped_bit_is_noticed(state, tmp_path, seed):
    text = json.dumps(manifest.describe(ABOUT, 4, state)).encode()
    random = np.random.default_rng(seed)
    damaged = bytearray(text)
    damaged[random.integers(len(text))] ^= 1 << int(random.integers(8))
    folder = write(tmp_path / "4", "")
    (folder / "about" / "metadata").write_bytes(damaged)
    with pytest.raises(Damaged, match="about/metadata"):
        manifest.read(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0", '"text"', '{"format": 1}'])
def test_what_is_no_manifest_is_damage(tmp_path, text):
    with pytest.raises(Damaged, match="about/metadata"):
        manifest.read(write(tmp_path / "4", text))
    with pytest.raises(Damaged, match="cannot be read"):
        manifest.read(tmp_path / "5")


def test_a_checkpoint_of_another_step_or_format_is_told(state, tmp_path, monkeypatch):
    held = json.dumps(manifest.describe(ABOUT, 4, state))
    with pytest.raises(Damaged, match="it is of step 4, by its manifest"):
        manifest.read(write(tmp_path / "8", held))
    assert manifest.read(write(tmp_path / "best", held))["step"] == 4
    with pytest.raises(UserError, match=r"old has no manifest: it was written by a version"):
        manifest.read(write(tmp_path / "old", json.dumps(ABOUT)))
    monkeypatch.setattr(manifest, "FORMAT", 2)
    with pytest.raises(UserError, match=r"is of format 1, and this lmjax reads 2: .* lmjax 0"):
        manifest.read(write(tmp_path / "4", held))


def test_another_model_is_said_array_by_array(state):
    held = manifest.describe(ABOUT, 4, state)
    assert manifest.differences(held, state) == []
    other = {
        "step": jnp.zeros((), jnp.int32),
        "params": {"kernel": jnp.zeros((8, 5)), "half": jnp.ones(3), "new": jnp.ones(1)},
    }
    assert manifest.differences(held, other) == [
        "it has no params/new",
        "params/half is bfloat16[3], and this run's float32[3]",
        "params/kernel is float32[8, 4], and this run's float32[8, 5]",
    ]
    del other["params"]
    assert "it has params/kernel, which this run has not" in manifest.differences(held, other)
