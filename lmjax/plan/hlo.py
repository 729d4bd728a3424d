"""Reading the text of a compiled module: computations, instructions, and how often each is run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f4e2m1fn": 4, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e4m3fn": 8,
    "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8, "f8e3m4": 8, "f8e8m0fnu": 8,
}  # fmt: skip
# What runs its computation as one instruction; `call-start` runs it on a SparseCore (TPU7x).
FUSED = ("fusion", "async-start", "call-start")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(?!\})")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class Array:
    """One array of a shape: its bytes without padding, and whether it lies in the main memory."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        """Bytes of its elements."""
        return math.prod(self.dims) * BITS.get(self.dtype, 0) / 8


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `called` are the computations it runs, by the attribute that names them."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    called: tuple[tuple[str, str], ...]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that it makes, a tuple's members one by one."""
        return arrays(self.shape)

    @property
    def op_name(self) -> str:
        """Where in the program it comes from ('jit(step)/jvp(DecoderLM)/blocks/...')."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """A module's computations by name, and which of them is the entry."""

    computations: dict[str, Computation] = field(default_factory=dict)
    entry: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """A computation that runs on its own (the entry, a loop's body) and how often in a step."""

    computation: str
    times: float


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text, `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`; tokens are left out."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype in BITS:
            sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
            found.append(Array(dtype, sizes, "S(" not in layout))
    return tuple(found)


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`."""
    module: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = module.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif _END.match(line):
            current = None
        elif _NAME.match(line):
            current.append(line)
        elif current:
            current[-1] += line  # a kernel's own notes go over several lines
    computations = {
        name: {i.name: i for line in lines if (i := _instruction(line)) is not None}
        for name, lines in module.items()
    }
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if not start:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside, attributes = rest[len(opcode) + 1 : end - 1], rest[end:]
    # The compiler's own notes are long, and hold no computation's name.
    plain = attributes.partition(", backend_config=")[0]
    called = _CALLED.findall(plain)
    for names in _BRANCHES.findall(plain):
        called += [("branch", name.strip().lstrip("%")) for name in names.split(",")]
    return Instruction(
        name=start[2],
        shape=shape,
        opcode=opcode.strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)) or ((inside,) if inside else ()),
        attributes=attributes,
        root=bool(start[1]),
        called=tuple(called),
    )


def _closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for bracket in re.finditer(r"[()]", text[start:]):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return start + bracket.end()
    return len(text)


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int:
    """How often a while loop's body runs: as the compiler noted, or up to its condition's bound.

    1 where neither says so.
    """
    if noted := re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes):
        return int(noted[1])
    called = dict(loop.called)
    bound = _bound(module, called.get("condition", ""))
    if bound is None:
        return 1
    limit, index, inclusive = bound
    start = 0
    tuple_ = caller.get(loop.operands[0]) if loop.operands else None
    if tuple_ is not None and tuple_.opcode == "tuple" and index < len(tuple_.operands):
        start = _constant(module, caller, tuple_.operands[index]) or 0
    return max(limit - start + inclusive, 1)


def _bound(module: Module, condition: str) -> tuple[int, int, int] | None:
    """(limit, the counter's place in the loop's tuple, 1 if the limit is included)."""
    instructions = module.computations.get(condition, {})
    limits = [v for name in instructions if (v := _constant(module, instructions, name))]
    counters = [
        int(found[1])
        for i in instructions.values()
        if i.opcode == "get-tuple-element" and (found := re.search(r"index=(\d+)", i.attributes))
    ]
    if len(set(limits)) != 1 or not counters:
        return None
    directions = {
        found[1]
        for name in (condition, *(c for i in instructions.values() for _, c in i.called))
        for i in module.computations.get(name, {}).values()
        if (found := re.search(r"direction=(\w+)", i.attributes))
    }
    return limits[0], counters[0], int("LE" in directions)


def _constant(module: Module, computation: Computation, name: str) -> int | None:
    """The value of an integer constant, behind copies too."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    try:
        return int(instruction.operands[0])
    except (ValueError, IndexError):
        return None


def frames(module: Module) -> list[Frame]:
    """The computations that run on their own, outermost first, with their runs in a step."""
    found = [Frame(module.entry, 1.0)]
    for frame in found:  # which grows
        for instruction in module.computations.get(frame.computation, {}).values():
            times = frame.times
            if instruction.opcode == "while":
                caller = module.computations[frame.computation]
                times *= trip_count(module, caller, instruction)
            if instruction.opcode in ("while", "call", "conditional"):
                found += [
                    Frame(name, times) for how, name in instruction.called if how != "condition"
                ]
    return found


def inside(module: Module, computation: str) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction) of a frame and of the fusions and asynchronous calls within it."""
    for instruction in module.computations.get(computation, {}).values():
        yield computation, instruction
        if instruction.opcode in FUSED:
            for _, name in instruction.called:
                yield from inside(module, name)
