"""Silent corruption: whether the devices that hold the same part of a parameter hold the same bits.

All of them started with the same bits and apply the same updates, so that any difference, however
small, says that one of them computed or kept something wrongly. Nothing else tells of it: a run
with replicas that have drifted apart goes on, and its loss looks like any other.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.engine.manifest import flat
from lmjax.engine.program import Program
from lmjax.engine.state import TrainState
from lmjax.errors import Exit, UserError
from lmjax.ops.checksum import checksum


class Corrupt(UserError):
    """Devices that should hold the same bits do not: names the parameters and the devices."""

    code = Exit.CORRUPT


@dataclass(frozen=True)
class Odd:
    """A parameter's part whose replicas differ.

    Args:
      path: of the parameter.
      devices: those that differ from the majority; all that hold the part where there is none.
      majority: how many agree; 0 where there is no majority.
    """

    path: str
    devices: tuple[jax.Device, ...]
    majority: int


def replica_check(program: Program) -> Callable[[TrainState], None]:
    """What compares the replicas of every parameter of a state, frozen ones too; compiled once.

    Each device makes the checksum (`ops.checksum`) of the part that it holds itself, so that
    nothing is taken for equal that may not be; all checksums go to all processes, which come to
    the same end. It reads the parameters once, and waits for the step that made them.

    Raises (from the returned function, in all processes alike):
      Corrupt: where replicas differ.
    """
    parts = _params(program.abstract_state)
    mesh = program.mesh
    devices = list(mesh.devices.flat)
    groups = {path: _groups(x, devices) for path, x in parts.items()}
    if not any(len(group) > 1 for found in groups.values() for group in found):
        return lambda state: None

    def local(*arrays: jax.Array) -> jax.Array:
        return jnp.stack([checksum(x) for x in arrays])[None]

    every = PartitionSpec(mesh.axis_names)
    on_each = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(x.sharding.spec for x in parts.values()),
        out_specs=every,
        check_vma=False,
    )
    # [device of the mesh, parameter, 2], whole in every process.
    gathered = jax.jit(on_each, out_shardings=NamedSharding(mesh, PartitionSpec()))
    compiled = gathered.lower(*parts.values()).compile()

    def check(state: TrainState) -> None:
        sums = np.asarray(compiled(*_params(state).values()).addressable_data(0))
        found = [
            odd
            for i, path in enumerate(parts)
            for group in groups[path]
            if (odd := compare(path, [devices[d] for d in group], sums[group, i])) is not None
        ]
        if found:
            raise Corrupt(_message(found, int(state.step.addressable_data(0))))

    return check


def compare(path: str, devices: list[jax.Device], sums: np.ndarray) -> Odd | None:
    """The devices, of those with the same part, whose checksums [device, 2] are not the majority's.

    None where all agree.
    """
    texts = [tuple(row) for row in sums.tolist()]
    (most, count), *_ = collections.Counter(texts).most_common(1)
    if count == len(texts):
        return None
    if 2 * count <= len(texts):
        return Odd(path, tuple(devices), 0)
    odd = tuple(d for d, text in zip(devices, texts, strict=True) if text != most)
    return Odd(path, odd, count)


def _params(state: TrainState) -> Mapping[str, Any]:
    return flat({"params": state.params, "frozen": state.frozen})


def _groups(x: jax.ShapeDtypeStruct, devices: list[jax.Device]) -> list[list[int]]:
    """Which devices, by their place in the mesh, hold the same part of an array."""
    assert isinstance(x.sharding, NamedSharding)
    indices = x.sharding.devices_indices_map(x.shape)
    found: dict[str, list[int]] = {}
    for place, device in enumerate(devices):
        found.setdefault(str(indices[device]), []).append(place)
    return list(found.values())


def _message(found: list[Odd], step: int) -> str:
    """Names the devices that differ, worst first, and some parameters of each."""
    paths: dict[str, list[str]] = {}
    for odd in found:
        names = " and ".join(_name(d) for d in odd.devices)
        if odd.majority:
            verb = "differs" if len(odd.devices) == 1 else "differ"
            names += f" {verb} from {odd.majority} others"
        else:
            names += " differ from each other, and no majority says which is right"
        paths.setdefault(names, []).append(odd.path)
    lines = [
        f"  {names}, in {', '.join(where[:3])}"
        + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        for names, where in sorted(paths.items(), key=lambda item: -len(item[1]))
    ]
    return (
        f"the parameters after step {step} are not the same on all devices that hold them:\n"
        + "\n".join(lines)
        + "\nA device computes or keeps numbers wrongly. Nothing was saved since they were last "
        "compared that can be trusted: take that device out of the run, verify the checkpoints "
        "(python -m lmjax.checkpoint verify), and go on from one of before."
    )


def _name(device: jax.Device) -> str:
    return f"device {device.id} ({device.device_kind}, process {device.process_index})"
