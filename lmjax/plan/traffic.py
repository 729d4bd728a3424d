"""Memory traffic of a compiled step, and what its forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping

from lmjax.plan.hlo import FUSED, Computation, Instruction, Module, frames

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "domain", "opt-barrier",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_THROUGH = ("bitcast", "copy", "convert", "reshape", "get-tuple-element", "copy-done")


def hbm_bytes(module: Module) -> float:
    """Bytes that one device reads from and writes to its main memory in a step: an estimate.

    Every instruction outside fusions reads its operands and writes its result; of an operand that a
    fusion only slices it reads the slice, and an update in place writes the update. What lies in
    on-chip memory is left out.
    """
    total = 0.0
    for frame in frames(module):
        computation = module.computations.get(frame.computation, {})
        moved = sum(_moved(module, computation, i) for i in computation.values())
        total += frame.times * moved
    return total


def _moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode in FUSED and instruction.called:
        callee = instruction.called[0][1]
        return _moved_by_fusion(module.computations.get(callee, {}), operands)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1]) if len(operands) > 1 else 0.0
    if instruction.opcode in _SLICES:
        return 2 * _in_hbm(instruction)
    written = _in_hbm(instruction)
    if instruction.opcode.endswith("-start"):  # its result repeats what it is given
        written = sum(a.bytes for a in instruction.arrays[:1] if a.in_hbm)
    return written + sum(_in_hbm(operand) for operand in operands)


def _moved_by_fusion(fused: Computation, operands: list[Instruction]) -> float:
    users: dict[str, list[Instruction]] = {}
    for instruction in fused.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    total = 0.0
    for parameter in fused.values():
        if parameter.opcode == "parameter":
            index = int(parameter.operands[0])
            if index < len(operands):
                total += min(_read(parameter, users), _in_hbm(operands[index]))
    for root in (i for i in fused.values() if i.root):
        parts = [fused[n] for n in root.operands] if root.opcode == "tuple" else [root]
        total += sum(_written(fused, part) for part in parts)
    return total


def _read(value: Instruction, users: Mapping[str, list[Instruction]]) -> float:
    """Bytes of a fusion's parameter that the fusion needs."""
    whole = sum(a.bytes for a in value.arrays)
    needed = 0.0
    for user in users.get(value.name, []):
        if user.opcode == "tuple":
            continue  # handed on as it is
        if user.opcode in _SLICES and user.operands[0] == value.name:
            needed += sum(a.bytes for a in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # updated where it lies
        elif user.opcode == "bitcast":
            needed += _read(user, users)
        else:
            return whole
    return min(needed, whole)


def _written(fused: Computation, value: Instruction) -> float:
    while value.opcode == "bitcast" and value.operands[0] in fused:
        value = fused[value.operands[0]]
    if value.opcode == "parameter":
        return 0.0
    if value.opcode == "dynamic-update-slice":
        update = fused.get(value.operands[1])
        return _in_hbm(update) if update is not None and _in_hbm(value) else 0.0
    return _in_hbm(value)


def _in_hbm(instruction: Instruction) -> float:
    return sum(a.bytes for a in instruction.arrays if a.in_hbm)


def kept_bytes(module: Module) -> float:
    """Bytes that loops of the forward pass hand to loops of the backward pass, on one device.

    0 where the layers are not in a loop: the compiler then counts them with the temporaries.
    """
    kept = 0.0
    for frame in frames(module):
        computation = module.computations.get(frame.computation, {})
        largest = 0.0
        for loop in computation.values():
            if loop.opcode == "while" and "transpose(" in loop.op_name and loop.operands:
                largest += _handed_over(computation, loop)
        kept = max(kept, largest)
    return kept


def _handed_over(computation: Computation, loop: Instruction) -> float:
    given = computation.get(loop.operands[0])
    if given is None or given.opcode != "tuple":
        return 0.0
    total = 0.0
    for name in given.operands:
        element = computation.get(name)
        source = element
        while source is not None and source.opcode in _THROUGH and source.operands:
            source = computation.get(source.operands[0])
        if (
            element is not None
            and source is not None
            and source.opcode == "while"
            and "jvp(" in source.op_name
            and "transpose(" not in source.op_name
        ):
            total += _in_hbm(element)
    return total
