"""Chips that need not be there: 'v5p:8x8x8', '2*v5e:16x16', 'cpu:8', 'h100:8' -> devices of jax.

Importing this starts no backend; `devices` does, and must then be the first in its process.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from lmjax.errors import UserError, did_you_mean
from lmjax.hardware import CHIPS, Chip
from lmjax.plan.gpus import target_config

Platform = Literal["tpu", "gpu", "cpu"]

# name: (device kind, dimensions of the torus, devices per chip, environment name of a small slice)
TPUS: Mapping[str, tuple[str, int, int, str]] = {
    "v4": ("TPU v4", 3, 1, "v4-16"),
    "v5e": ("TPU v5 lite", 2, 1, "v5litepod-16"),
    "v5p": ("TPU v5", 3, 1, "v5p-16"),
    "v6e": ("TPU v6 lite", 2, 1, "v6e-16"),
    "tpu7x": ("TPU7x", 3, 2, "tpu7x-16"),
}
GPUS: Mapping[str, str] = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
}
GPUS_PER_NODE = 8
KNOWN = "v5e:4x4, v6e:16x16, v4:4x4x4, v5p:8x8x8, tpu7x:4x4x4, 2*v5e:16x16, h100:8, cpu:8"
FULL_AXIS = 16  # of a two-dimensional pod: its rings close there, and in no smaller slice
LARGEST = 2**20  # chips
CUBE = 4  # three-dimensional slices are made of cubes of 4 x 4 x 4, whose rings are closed


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips and how they are joined.

    Args:
      name: as it was given.
      family: 'v5p', 'h100', 'cpu', ...
      shape: chips along each dimension of one slice's torus; one number where there is no torus.
      slices: how many such slices the slow network joins.
      wrap: along which dimensions the torus is closed to a ring.
      devices_per_chip: how many devices jax counts in a chip.
      chip: peaks of one device; None where they are not known.
    """

    name: str
    platform: Platform
    family: str
    device_kind: str
    shape: tuple[int, ...]
    slices: int
    wrap: tuple[bool, ...]
    devices_per_chip: int
    chip: Chip | None

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """Devices of all slices, as jax counts them."""
        return self.num_chips * self.devices_per_chip

    @property
    def limit_bytes(self) -> float:
        """Memory that a program may use on one device; 0 where it is not known."""
        return (self.chip.program_bytes or self.chip.hbm_bytes) if self.chip else 0.0


def parse_topology(text: str) -> Topology:
    """Reads a topology's name; raises UserError, which lists what is known."""
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+){0,2})", text.strip().lower())
    if not match:
        raise UserError(
            f"topology {text!r} is not [SLICES*]FAMILY:SIZE, as in {KNOWN}. Families: "
            f"{', '.join((*TPUS, *GPUS, 'cpu'))}."
        )
    family, sizes = match[2], [match[1] or "1", *match[3].split("x")]
    slices, *shape = (int(n) if len(n) < 9 else LARGEST + 1 for n in sizes)
    if min(slices, *shape) < 1:
        raise UserError(f"topology {text!r} has a size of 0: all are at least 1, as in {KNOWN}.")
    if slices * math.prod(shape) > LARGEST:
        raise UserError(f"topology {text!r} has more than {LARGEST} chips: there is no such pod.")
    if family in TPUS:
        kind, rank, per_chip, _ = TPUS[family]
        if len(shape) != rank:
            example = next(name for name in KNOWN.split(", ") if name.startswith(family))
            raise UserError(
                f"topology {text!r}: a slice of {family} has {rank} dimensions, as in {example}."
            )
        closed = (
            tuple(n == FULL_AXIS for n in shape)
            if rank == 2
            else (all(n % CUBE == 0 for n in shape),) * 3
        )
        return Topology(
            name=text,
            platform="tpu",
            family=family,
            device_kind=kind,
            shape=tuple(shape),
            slices=slices,
            wrap=closed,
            devices_per_chip=per_chip,
            chip=CHIPS[kind],
        )
    if family not in GPUS and family != "cpu":
        raise UserError(
            f"unknown topology {text!r}."
            + did_you_mean(family, (*TPUS, *GPUS, "cpu"))
            + f" As in {KNOWN}."
        )
    if len(shape) != 1 or slices != 1:
        raise UserError(f"topology {text!r}: of {family} give a number, as in {family}:8.")
    return Topology(
        name=text,
        platform="gpu" if family in GPUS else "cpu",
        family=family,
        device_kind=GPUS.get(family, "cpu"),
        shape=tuple(shape),
        slices=1,
        wrap=(False,),
        devices_per_chip=1,
        chip=CHIPS.get(GPUS.get(family, "")),
    )


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, of which none need exist.

    Those of a TPU, and of a GPU where jax's CUDA plugin is installed, can only be compiled for. A
    CPU's, which stand for GPUs without that plugin, are as many as asked for.

    Raises:
      UserError: where libtpu is not installed, or the compiler refuses the topology.
    """
    if topology.platform == "gpu" and importlib.util.find_spec("jax_cuda12_plugin") is not None:
        return _gpu_devices(topology)
    if topology.platform != "tpu":
        return _cpu_devices(topology.num_devices)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"planning for {topology.name} needs libtpu, the compiler of TPUs, which is not "
            "installed: pip install 'lmjax[plan-tpu]' (or scripts/setup test plan-tpu)."
        )
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",  # no question to a metadata server, which is not there
        "TPU_WORKER_HOSTNAMES": "planner",
        "TPU_ACCELERATOR_TYPE": TPUS[topology.family][3],
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may plan at the same time
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if any(topology.wrap):
        options["wrap"] = (*topology.wrap, *(False,) * (3 - len(topology.wrap)))
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if any(n % 2 for n in topology.shape[:2]):
        options["chips_per_host_bounds"] = (1, 1, 1)  # a host's four chips do not divide it
    if topology.family == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the machines
    shape = "x".join(map(str, topology.shape))
    options["topology_name"] = f"{topology.family}:{shape}"
    return _described(topology, "tpu", options)


def _gpu_devices(topology: Topology) -> list[jax.Device]:
    nodes = max(topology.num_devices // GPUS_PER_NODE, 1)
    each = topology.num_devices // nodes
    if nodes * each != topology.num_devices or (nodes > 1 and each != GPUS_PER_NODE):
        raise UserError(
            f"topology {topology.name!r}: up to {GPUS_PER_NODE} GPUs, or a multiple of them."
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    options = {
        "topology_name": topology.name,
        "topology": f"1x{nodes}x{each}",
        "target_config": target_config(topology.family, topology.device_kind),
    }
    return _described(topology, "cuda", options)


def _described(topology: Topology, platform: str, options: dict[str, Any]) -> list[jax.Device]:
    """Devices by the platform's compiler; the machine's own are a CPU's meanwhile."""
    from jax._src import xla_bridge
    from jax.experimental import topologies

    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")  # plugins would look for chips of this machine
    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except Exception as error:
        raise UserError(
            f"the compiler refuses the topology {topology.name!r}: {first_line(error)} "
            f"Known good: {KNOWN}."
        ) from error


def _cpu_devices(count: int) -> list[jax.Device]:
    """CPU devices; those of an already started backend where there are enough."""
    from jax._src import xla_bridge

    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"{count} CPU devices are asked for, and jax has started with {len(found)}: plan in a "
            "process of its own."
        )
    return found[:count]


def first_line(error: BaseException) -> str:
    """What the compiler says, without its further lines; ends with a full stop."""
    return str(error).strip().splitlines()[0].rstrip(".") + "."
