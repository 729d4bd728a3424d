"""The manifest of a checkpoint: what it holds, bit for bit, and what it was made by.

It is the JSON part of the checkpoint, and lies in the same folder as the arrays, which gets its
name in one step once all of it is written: there is no checkpoint without a manifest.

    config, tokenizer, data, ...  what the run gave
    format, step, time            of the checkpoint; the time is UTC
    arrays                        path -> shape, dtype and `ops.checksum` of the array
    tokenizer_sha256, versions    of the tokenizer, as text, and of the libraries
    mesh                          axes, devices and processes that saved it
    sha256                        of all of this
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.errors import UserError
from lmjax.ops.checksum import checksum

FORMAT = 1
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "lmjax")
_OURS = ("format", "step", "time", "arrays", "tokenizer_sha256", "versions", "mesh", "sha256")


class Damaged(Exception):
    """A file of a checkpoint is not what was written; says which, and why."""


def describe(about: Mapping[str, Any], step: int, state: Any) -> dict[str, Any]:
    """The manifest of a state that is about to be saved; its checksums are made on its devices.

    Args:
      about: what the run says of itself, in JSON's types; names of the manifest's own are dropped.
      step: of the checkpoint.
      state: a tree of arrays, sharded or not; every process calls, and gets the same.
    """
    sums = checksums(state)
    arrays = {
        path: {"shape": list(x.shape), "dtype": x.dtype.name, "checksum": sums[path]}
        for path, x in flat(state).items()
    }
    return seal(about, step, arrays, _mesh(state))


def seal(
    about: Mapping[str, Any], step: int, arrays: Mapping[str, Any], mesh: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of arrays (path -> shape, dtype, checksum) that the devices of `mesh` held."""
    given = {name: value for name, value in about.items() if name not in _OURS}
    given |= {
        "format": FORMAT,
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arrays": arrays,
        "tokenizer_sha256": hashlib.sha256(str(about.get("tokenizer", "")).encode()).hexdigest(),
        "versions": versions(),
        "mesh": mesh,
    }
    given = json.loads(json.dumps(given))
    return {**given, "sha256": _sha256(given)}


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder.

    Raises:
      Damaged: where it is not there, cannot be read, or is not what was written.
      UserError: where it is of another format than this one.
    """
    path = folder / "about" / "metadata"
    try:
        found = json.loads(path.read_text())
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise Damaged(f"its manifest, about/metadata, cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise Damaged("its manifest, about/metadata, is not what was written")
    if not set(found) & {"format", "arrays", "sha256"}:
        raise UserError(
            f"{folder} has no manifest: it was written by a version of lmjax that made no "
            "checksums, and nothing says whether it is whole. Go on with that version, or start "
            "again with another --workdir."
        )
    given = {name: value for name, value in found.items() if name != "sha256"}
    if found.get("sha256") != _sha256(given):
        raise Damaged("its manifest, about/metadata, is not what was written (by its sha256)")
    if found["format"] != FORMAT:
        raise UserError(
            f"{folder} is of format {found['format']}, and this lmjax reads {FORMAT}: "
            f"it was written by lmjax {found['versions'].get('lmjax')}. Go on with that version."
        )
    if folder.name.isdigit() and int(folder.name) != found["step"]:
        raise Damaged(f"it is of step {found['step']}, by its manifest")
    return found


def differences(manifest: Mapping[str, Any], abstract: Any) -> list[str]:
    """What of a tree's paths, shapes and dtypes is not as the manifest says, as sentences."""
    stored = {path: (tuple(a["shape"]), a["dtype"]) for path, a in manifest["arrays"].items()}
    wanted = {path: (tuple(x.shape), x.dtype.name) for path, x in flat(abstract).items()}
    lines = [f"it has no {path}" for path in wanted if path not in stored]
    lines += [f"it has {path}, which this run has not" for path in stored if path not in wanted]
    for path in wanted.keys() & stored.keys():
        if wanted[path] != stored[path]:
            has, wants = (f"{dtype}{list(shape)}" for shape, dtype in (stored[path], wanted[path]))
            lines.append(f"{path} is {has}, and this run's {wants}")
    return sorted(lines)


def abstract(manifest: Mapping[str, Any], path: str, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, as the manifest has them."""
    entry = manifest["arrays"][path]
    return jax.ShapeDtypeStruct(
        tuple(entry["shape"]), jax.numpy.dtype(entry["dtype"]), sharding=sharding
    )


def damaged(manifest: Mapping[str, Any], tree: Any) -> list[str]:
    """The paths of a tree's arrays whose checksums are not those of the manifest.

    The checksums are made on the arrays' devices; every process calls, and gets the same.
    """
    sums = checksums(tree)
    return [path for path, value in sums.items() if value != manifest["arrays"][path]["checksum"]]


def checksums(tree: Any) -> dict[str, str]:
    """The checksum of every array of a tree, by path, as 16 hexadecimal digits."""
    sums = {path: _summing(_whole(x))(x) for path, x in flat(tree).items()}
    return {path: in_text(value) for path, value in jax.device_get(sums).items()}


def in_text(value: np.ndarray) -> str:
    """A checksum as the manifest writes it."""
    return f"{int(value[0]):08x}{int(value[1]):08x}"


def flat(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by path, as 'opt_state/1/mu/blocks/mlp/up'."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def versions() -> dict[str, str]:
    """Of python and the libraries that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _sha256(tree: Any) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _whole(x: Any) -> NamedSharding | None:
    """On all devices that hold parts of an array, what each of them is to know whole."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return None


@functools.cache
def _summing(out: NamedSharding | None) -> Any:
    return jax.jit(checksum, out_shardings=out)


def _mesh(state: Any) -> dict[str, Any]:
    shardings = [x.sharding for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    device = meshes[0].devices.flat[0] if meshes else next(iter(shardings[0].device_set))
    return {
        "axes": {axis: int(n) for axis, n in meshes[0].shape.items()} if meshes else {},
        "devices": int(meshes[0].size) if meshes else 1,
        "kind": device.device_kind,
        "processes": jax.process_count(),
    }
