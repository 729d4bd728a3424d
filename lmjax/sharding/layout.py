"""Devices per mesh axis, the mesh that they make, and the layouts that fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lmjax.errors import UserError

# Outermost (slowest network) first: neighbours in `tensor` are neighbours on the chip's own links.
MESH_AXES = ("slices", "data", "fsdp", "stage", "context", "expert", "tensor")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many devices lie along each mesh axis; one of them may be -1, for all that remain.

    `slices` are data-parallel groups joined by the slow network. `data` replicates parameters,
    `fsdp` shards them and their moments, `tensor` splits heads, hidden units and vocabulary,
    `context` the sequence, `expert` the experts (and, like `data`, the batch) and `stage` the
    layers.

    Args:
      stage_microbatches: parts of the batch that follow each other through the stages; 0 for one
        per stage.
      stage_repeats: how often a microbatch goes round the stages, each time through the next
        layers (a circular schedule): more shrink the share of idle stages.
    """

    slices: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    stage: int = 1
    stage_microbatches: int = 0
    stage_repeats: int = 1

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        if bad := [a for a, n in sizes.items() if n < 1 and n != -1]:
            raise UserError(f"{bad[0]} is {sizes[bad[0]]}: must be at least 1, or -1 for the rest.")
        if len(free := [a for a, n in sizes.items() if n == -1]) > 1:
            raise UserError(f"{' and '.join(free)} are -1: only one axis can take the rest.")
        if self.stage_microbatches < 0 or self.stage_repeats < 1:
            raise UserError(
                f"stage_microbatches is {self.stage_microbatches} and stage_repeats "
                f"{self.stage_repeats}: give at least 0 and at least 1."
            )

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The mesh shape on `num_devices` devices, -1 resolved.

        Raises UserError where it does not fit.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = math.prod(n for n in sizes.values() if n != -1)
        asks = f"a multiple of {fixed}" if -1 in sizes.values() else str(fixed)
        for axis, n in sizes.items():
            if n == -1 and num_devices % fixed == 0:
                sizes[axis] = num_devices // fixed
        if math.prod(sizes.values()) != num_devices:
            raise UserError(
                f"layout ({self.describe()}) asks for {asks} devices, and there are {num_devices}. "
                f"{nearest(sizes, num_devices)}"
            )
        return sizes

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The device mesh, all axes named, neighbours together where the platform knows them.

        Raises UserError where `slices` is not the number of groups that the slow network joins.
        """
        devices = jax.devices() if devices is None else devices
        shape = tuple(self.sizes(len(devices)).values())
        if devices[0].platform == "tpu":
            grid = _tpu_grid(shape, devices)
        else:
            grid = np.asarray(devices).reshape(shape)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def describe(self) -> str:
        """The axes that are not 1, as `data=2, tensor=4`."""
        return described({axis: getattr(self, axis) for axis in MESH_AXES})


def described(sizes: Mapping[str, int]) -> str:
    """Mesh axes that are not 1, as `data=2, tensor=4`."""
    return ", ".join(f"{a}={n}" for a, n in sizes.items() if n != 1) or "one device"


def _tpu_grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the mesh's shape: each slice laid on its torus, slices outermost."""
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    slices, *inner = shape
    if len(groups) > 1 and len(groups) != slices:
        raise UserError(
            f"the devices lie in {len(groups)} slices, joined by the slow network, and the layout "
            f"has slices={slices}: set it to {len(groups)}."
        )
    if len(groups) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    grids = [
        mesh_utils.create_device_mesh(tuple(inner), group, allow_split_physical_axes=True)
        for _, group in sorted(groups.items())
    ]
    return np.stack(grids)


@dataclass(frozen=True)
class Split:
    """A size that the product of some mesh axes (times `times`) has to divide."""

    what: str
    size: int
    name: str
    axes: tuple[str, ...]
    times: int = 1

    def ways(self, sizes: Mapping[str, int]) -> int:
        """Into how many parts these axis sizes cut it."""
        return self.times * math.prod(sizes[axis] for axis in self.axes)

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether they divide it."""
        return self.size % self.ways(sizes) == 0


def nearest(
    sizes: Mapping[str, int], num_devices: int, splits: Sequence[Split] = (), count: int = 3
) -> str:
    """A sentence that names the layouts for `num_devices` which fit, those most like `sizes` first.

    They vary `data`, `fsdp` and the axes that `sizes` uses.
    """
    free = [a for a in MESH_AXES if a in ("data", "fsdp") or sizes[a] != 1]
    fitting = []
    for factors in _factorizations(num_devices, len(free)):
        candidate = dict.fromkeys(MESH_AXES, 1) | dict(zip(free, factors, strict=True))
        if all(split.fits(candidate) for split in splits):
            pairs = [(candidate[a], sizes[a]) for a in free if sizes[a] > 0]
            distance = sum(abs(math.log(new / old)) for new, old in pairs)
            fitting.append((distance, [candidate[a] for a in MESH_AXES], candidate))
    if not fitting:
        return f"No layout of these axes on {num_devices} devices divides everything."
    best = [described(candidate) for *_, candidate in sorted(fitting, key=lambda f: f[:2])[:count]]
    return f"The nearest layouts that fit: ({'), ('.join(best)})."


def _factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered product of so many factors."""
    if parts == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for rest in _factorizations(number // first, parts - 1):
            yield (first, *rest)


@functools.cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)
