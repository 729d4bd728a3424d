"""The collectives of a compiled step: which, over which mesh axes, how often, how many bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmjax.plan.hlo import Computation, Instruction, Module, arrays, frames, inside

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# On v4 to v6e a reduce-scatter is a fusion of this name around an all-reduce.
_SCATTER_FUSION = "all-reduce-scatter"
# Between slices a collective is a transfer by the host, which keeps its name.
_BETWEEN_SLICES = re.compile(r'_xla_host_transfer_rendezvous="([a-z\-]+)')
SLICES = "slices"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of the program.

    Args:
      kind: one of `KINDS`.
      axes: mesh axes along which its groups lie, in the mesh's order.
      group: the devices (places in the mesh) of its first group; of a permute, one pair.
      payload_bytes: what one device gives to it, once.
      sent_bytes: what a device sends in all its runs of a step, by ring algorithms.
      times: runs in a step.
      source: where in the program it comes from.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    payload_bytes: float
    sent_bytes: float
    times: float
    source: str


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective of a module, counted once where the compiler spread it over fusions.

    Args:
      mesh: the mesh's axes and sizes, outermost first.
    """
    found = []
    for frame in frames(module):
        seen: set[str] = set()
        sources: dict[str, str] = {}
        for name, instruction in inside(module, frame.computation):
            sources |= {called: instruction.op_name for _, called in instruction.called}
            kind = _kind(name, instruction)
            if kind is None:
                continue
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            if chain and chain[1] in seen:
                continue  # spread over the fusions that it runs beside, each of which repeats it
            if chain:
                seen.add(chain[1])
            group = (
                _across_slices(mesh)
                if instruction.opcode == "send"
                else first_group(instruction.attributes, math.prod(mesh.values()))
            )
            payload = _payload(module.computations[name], instruction)
            found.append(
                Collective(
                    kind=kind,
                    axes=axes_of(group, mesh),
                    group=tuple(int(i) for i in group),
                    payload_bytes=payload,
                    sent_bytes=frame.times * sent(kind, payload, len(group)),
                    times=frame.times,
                    source=instruction.op_name or sources.get(name, ""),
                )
            )
    return [c for c in found if len(c.group) > 1]


def sent(kind: str, payload: float, ways: int) -> float:
    """Bytes that each of `ways` devices sends, of what each gives: ring algorithms.

    An all-gather passes on the parts of all others; a reduce-scatter sends its part to all others;
    an all-reduce is the one and then the other.
    """
    if ways < 2:
        return 0.0
    factor = {
        "all-gather": ways - 1.0,
        "all-reduce": 2 * (ways - 1) / ways,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }
    return payload * factor.get(kind, (ways - 1) / ways)


def _across_slices(mesh: Mapping[str, int]) -> np.ndarray:
    grid = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    return np.moveaxis(grid, list(mesh).index(SLICES), 0).reshape(mesh[SLICES], -1)[:, 0]


def _kind(computation: str, instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send" and (found := _BETWEEN_SLICES.search(instruction.attributes)):
        kind = found[1]
    if kind not in KINDS:
        return None
    if kind == "all-reduce" and computation.startswith(_SCATTER_FUSION):
        return "reduce-scatter"
    return kind


def _payload(computation: Computation, instruction: Instruction) -> float:
    operands = [computation[name] for name in instruction.operands if name in computation]
    if not operands:
        return sum(a.bytes for a in arrays(instruction.shape))
    if instruction.opcode in ("ragged-all-to-all", "send"):
        operands = operands[:1]  # then come the output and the rows' sizes, or a token
    return sum(a.bytes for operand in operands for a in operand.arrays)


def first_group(attributes: str, num_devices: int) -> np.ndarray:
    """The devices of the first group, from any of the forms in which groups are printed.

    `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, an iota; `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0))
    {'a'}`, the groups along some axes of a mesh; of a permute, the first pair between two devices.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        for pair in re.findall(r"(\d+),\s*(\d+)", pairs[1]):
            if pair[0] != pair[1]:
                return np.array([int(n) for n in pair])
        return np.array([0])
    if mesh := re.search(
        r"replica_groups=@?\w*mesh\w*\[([^\]]*)\](?:, device_ids=\((.*?)\) )?[^{]*\{([^}]*)\}",
        attributes,
    ):
        return _mesh_group(mesh[1], mesh[2], mesh[3])
    if iota := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        groups = _iota(_numbers(iota[2]), _numbers(iota[3])).reshape(_numbers(iota[1]))
        return np.asarray(groups.reshape(groups.shape[0], -1)[0])
    if listed := re.search(r"replica_groups=\{\{([\d,\s]*)\}", attributes):
        return np.array(_numbers(listed[1]))
    return np.arange(num_devices)


def _mesh_group(axes: str, device_ids: str | None, grouped: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if device_ids:
        order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
        ids = (
            _iota(_numbers(order[1]), _numbers(order[2]))
            if order
            else np.array(_numbers(device_ids))
        ).reshape(-1)
    grid = ids.reshape(tuple(sizes.values()))
    first: list[slice | int] = [0] * len(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        axis = list(sizes).index(name)
        if not part:
            first[axis] = slice(None)
        else:  # a part of an axis: `before` parts lie outside it, the rest inside
            inner = sizes[name] // (int(before) * int(part))
            first[axis] = slice(0, int(part) * inner, inner)
    return np.asarray(grid[tuple(first)]).reshape(-1)


def _iota(dims: Sequence[int], order: Sequence[int]) -> np.ndarray:
    ids = np.arange(math.prod(dims)).reshape(tuple(dims))
    return ids.transpose(order) if order else ids


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def axes_of(group: Sequence[int] | np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(np.asarray(group), tuple(mesh.values()))
    return tuple(
        name for name, place in zip(mesh, places, strict=True) if len(np.unique(place)) > 1
    )
