"""Where numbers stop being finite: the first equation of a computation, or the first input.

A function is traced to a jaxpr, and its equations are evaluated one after the other. Each array
that is not finite carries its origin: the equation that made it of finite ones. What the function
returns then names the origin that matters, so that an infinity which the computation masks, as many
do on purpose, is no finding. Loops are run whole, and equation by equation only where what they
return is not finite.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.extend.core import Literal as Constant

from lmjax.engine.finding import (
    NAN,
    NEGATIVE,
    Finding,
    Place,
    all_finite,
    described,
    kinds_of,
    measured,
    source_of,
)
from lmjax.engine.program import COMPILER_OPTIONS

# How much an origin is worth: constants are infinite on purpose, and -inf often is (log 0).
_BORN, _PERHAPS, _GIVEN = 0, 1, 2
_NEGATIVE_ON_PURPOSE = {"log", "log1p", "div", "convert_element_type", "reduce_max", "cummax"}

# Equations that are a call of a jaxpr on the same arguments, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
# Equations that return nothing but elements of what they are given.
_MOVES = {
    "broadcast_in_dim",
    "concatenate",
    "copy",
    "dynamic_slice",
    "dynamic_update_slice",
    "name",
    "optimization_barrier",
    "pad",
    "reshape",
    "rev",
    "select_n",
    "sharding_constraint",
    "slice",
    "squeeze",
    "transpose",
}


def first(function: Callable[..., Any], *args: Any) -> Finding | None:
    """What makes the results of `function(*args)` not finite; None where they are finite.

    An input that is not finite is the finding before any equation; of equations it is the first
    that returns NaN, or an infinity, of finite arguments. A -inf that may be on purpose (log 0) is
    one only where nothing else is found, as are constants and infinite numbers among the inputs.
    """
    closed = jax.make_jaxpr(function)(*args)
    leaves, names = [], []
    labels = list(inspect.signature(function).parameters)
    for number, arg in enumerate(args):
        label = labels[number] if number < len(labels) else str(number)
        for path, leaf in jax.tree_util.tree_flatten_with_path(arg)[0]:
            inner = jax.tree_util.keystr(path, simple=True, separator="/")
            names.append(f"{label}/{inner}" if inner else label)
            leaves.append(leaf)
    return evaluate(closed, leaves, names)[1]


def evaluate(
    closed: ClosedJaxpr, inputs: Sequence[Any], names: Sequence[str]
) -> tuple[list[Any], Finding | None]:
    """Evaluates a jaxpr on one device: (its outputs, what makes them not finite, see `first`).

    Takes as long as compiling the computation and running it once where the outputs are finite, and
    half as long again where they are not (a step of GPT-2 124M on two CPU cores). An array is
    dropped after its last use; the inputs stay.

    Args:
      closed: as `jax.make_jaxpr` and `engine.program.Draft.jaxpr` have it.
      inputs: its arguments, flat.
      names: of the inputs.
    """
    search = _Search()
    given = [search.input(jnp.asarray(x), name) for x, name in zip(inputs, names, strict=True)]
    outputs = search.run(closed, given, Place())
    origins = [
        out.origin
        for out in outputs
        if out.origin and (out.origin.rank < _GIVEN or out.kinds & NAN)
    ]
    return [out.array for out in outputs], min(origins).finding if origins else None


class _Origin(NamedTuple):
    """Why an array is not finite; the least is the one to report: its rank, then its time."""

    rank: int
    time: int
    finding: Finding

    def __lt__(self, other: tuple[Any, ...]) -> bool:
        return self[:2] < other[:2]


class _Value(NamedTuple):
    array: Any
    kinds: int = 0
    origin: _Origin | None = None


class _Search:
    """The interpreter; it counts the origins that it meets."""

    def __init__(self) -> None:
        self.times = itertools.count()

    def input(self, array: jax.Array, name: str) -> _Value:
        if not (kinds := kinds_of(array)):
            return _Value(array)
        # An infinite number, unlike an array, is mostly one on purpose: the best loss so far.
        rank = _GIVEN if array.ndim == 0 and not kinds & NAN else _BORN
        return _Value(array, kinds, self.origin(rank, array, array=name))

    def constant(self, value: Any) -> _Value:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
        if not (kinds := kinds_of(array)):
            return _Value(value)
        return _Value(value, kinds, self.origin(_GIVEN, array, array="a constant"))

    def origin(self, rank: int, values: Any, **fields: Any) -> _Origin:
        return _Origin(rank, next(self.times), Finding(**measured(values), **fields))

    def run(
        self, closed: Any, inputs: Sequence[_Value], place: Place, *, fine: bool = False
    ) -> list[_Value]:
        """Evaluates a jaxpr, open or closed, with units compiled unless `fine`."""
        jaxpr = getattr(closed, "jaxpr", closed)
        values: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, constant in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
            values[variable] = self.constant(constant)
        for unit in _units(jaxpr, fine):
            given = [values[variable] for variable in unit.inputs]
            for variable in unit.dead:
                del values[variable]
            values.update(zip(unit.outputs, self.unit(unit, given, place), strict=True))
        return [
            self.constant(atom.val) if isinstance(atom, Constant) else values[atom]
            for atom in jaxpr.outvars
        ]

    def unit(self, unit: _Unit, inputs: list[_Value], place: Place) -> list[_Value]:
        before = min((value.origin for value in inputs if value.origin), default=None)
        born = before is not None and before.rank < _GIVEN
        lost = before is not None and any(
            v.kinds & NAN and v.origin.rank == _BORN for v in inputs if v.origin
        )
        if unit.compiled is not None and (lost or not born):
            arrays, finite = unit.compiled(*(value.array for value in inputs))
            if lost or np.all(finite):  # of what follows a NaN nothing need be told apart
                whole = np.asarray(finite)
                kinds = [0 if ok else kinds_of(x) for x, ok in zip(arrays, whole, strict=True)]
                return [
                    _Value(x, k, before if k else None) for x, k in zip(arrays, kinds, strict=True)
                ]
            del arrays
        return self.each(unit, inputs, place)

    def each(self, unit: _Unit, inputs: list[_Value], place: Place) -> list[_Value]:
        """Evaluates the equations of a unit one by one."""
        values = dict(zip(unit.inputs, inputs, strict=True))
        inputs.clear()
        for equation, dead in zip(unit.equations, unit.dead_after, strict=True):
            arguments = [
                self.constant(atom.val) if isinstance(atom, Constant) else values[atom]
                for atom in equation.invars
            ]
            outputs = self.equation(equation, arguments, place.at(equation))
            values.update(zip(equation.outvars, outputs, strict=True))
            del arguments, outputs
            for variable in dead:
                del values[variable]
        return [values[variable] for variable in unit.outputs]

    def equation(self, equation: Any, inputs: list[_Value], place: Place) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            return self.run(params[_CALLS[name]], inputs, place, fine=not _loops(equation))
        if name == "cond":
            branches = params["branches"]
            choice = min(max(int(inputs[0].array), 0), len(branches) - 1)
            return self.run(branches[choice], inputs[1:], place, fine=True)
        if name == "scan" and params["length"]:
            return self.scan(params, inputs, place)
        if name == "while":
            return self.loop(params, inputs, place)
        return self.simple(equation, inputs, place)

    def scan(self, params: Any, inputs: list[_Value], place: Place) -> list[_Value]:
        held, carried = params["num_consts"], params["num_carry"]
        consts, carry = inputs[:held], inputs[held : held + carried]
        steps = range(params["length"])
        collected: list[list[_Value]] = []
        for i in reversed(steps) if params["reverse"] else steps:
            rows = [self.row(value, i) for value in inputs[held + carried :]]
            outputs = self.run(params["jaxpr"], [*consts, *carry, *rows], place.inside(i))
            carry = outputs[:carried]
            collected.append(outputs[carried:])
        if params["reverse"]:
            collected.reverse()
        stacked = []
        for position in range(len(params["jaxpr"].out_avals) - carried):
            rows = [row[position] for row in collected]
            for row in collected:
                row[position] = _Value(None)  # two copies of one of them at a time, not of all
            stacked.append(_stacked(rows))
        return [*carry, *stacked]

    def loop(self, params: Any, inputs: list[_Value], place: Place) -> list[_Value]:
        tested, held = params["cond_nconsts"], params["body_nconsts"]
        test, consts = inputs[:tested], inputs[tested : tested + held]
        carry = inputs[tested + held :]
        for i in itertools.count():
            if not bool(self.run(params["cond_jaxpr"], [*test, *carry], place)[0].array):
                break
            carry = self.run(params["body_jaxpr"], [*consts, *carry], place.inside(i))
        return carry

    def row(self, value: _Value, index: int) -> _Value:
        array = _row(value.array, index)
        kinds = kinds_of(array) if value.kinds else 0
        return _Value(array, kinds, value.origin if kinds else None)

    def simple(self, equation: Any, inputs: list[_Value], place: Place) -> list[_Value]:
        arrays = _bind(equation, [value.array for value in inputs])
        given = functools.reduce(lambda kinds, value: kinds | value.kinds, inputs, 0)
        if not given and equation.primitive.name in _MOVES:
            return [_Value(array) for array in arrays]
        before = min((value.origin for value in inputs if value.origin), default=None)
        outputs = []
        for array in arrays:
            kinds = kinds_of(array)
            origin = before if kinds else None
            # A NaN, or an infinity of finite numbers, begins here; what is infinite on purpose may
            # go on being so, with either sign.
            new = (kinds & NAN and not given & NAN) or not given
            if kinds and new and (before is None or before.rank > _BORN):
                purpose = kinds == NEGATIVE and equation.primitive.name in _NEGATIVE_ON_PURPOSE
                origin = self.origin(
                    _PERHAPS if purpose else _BORN,
                    array,
                    primitive=equation.primitive.name,
                    modules=place.modules,
                    phase="backward" if place.backward else "forward",
                    loops=place.loops,
                    operands=tuple(filter(None, (described(value.array) for value in inputs))),
                    source=source_of(equation),
                    cause=before.finding if before else None,
                )
            outputs.append(_Value(array, kinds, origin))
        return outputs


@jax.jit
def _row(array: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)


def _stacked(rows: list[_Value]) -> _Value:
    kinds = functools.reduce(lambda bits, row: bits | row.kinds, rows, 0)
    origin = min((row.origin for row in rows if row.origin), default=None)
    return _Value(jnp.stack([row.array for row in rows]), kinds, origin)


def _bind(equation: Any, arrays: Sequence[Any], **changes: Any) -> list[Any]:
    primitive = equation.primitive
    params = primitive.get_bind_params({**equation.params, **changes})
    with equation.ctx.manager:
        outputs = primitive.bind(*arrays, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Equations that are evaluated together.

    Args:
      equations: in order.
      inputs: the variables that they read.
      outputs: the variables of theirs that are read later.
      dead: those of `inputs` that nothing reads later.
      dead_after: of each equation, the variables that nothing in the unit reads after it.
      compiled: (arrays) -> (arrays, whether each is finite); None where that is not tried.
    """

    equations: Sequence[Any]
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    dead: Sequence[Any]
    dead_after: Sequence[Sequence[Any]]
    compiled: Callable[..., tuple[list[Any], Any]] | None


@functools.lru_cache(maxsize=256)  # of the bodies of loops, too, which run often
def _units(jaxpr: Any, fine: bool) -> list[_Unit]:
    """Cuts a jaxpr at its loops, each of which is a unit of its own."""
    groups: list[list[Any]] = []
    for equation in jaxpr.eqns:
        if not groups or _loops(equation) or _loops(groups[-1][0]):
            groups.append([])
        groups[-1].append(equation)
    # From the last to the first: what is read later is known.
    later = set(_variables(jaxpr.outvars))
    units = []
    for equations in reversed(groups):
        made = {v for equation in equations for v in equation.outvars}
        read = dict.fromkeys(v for e in equations for v in _variables(e.invars) if v not in made)
        outputs = [v for equation in equations for v in equation.outvars if v in later]
        kept, dead_after = {*outputs}, []
        for equation in reversed(equations):
            touched = dict.fromkeys([*_variables(equation.invars), *equation.outvars])
            dead_after.append([v for v in touched if v not in kept])
            kept.update(touched)
        # A call with a loop inside is cut in its turn.
        tried = equations[0].primitive.name not in _CALLS if _loops(equations[0]) else not fine
        units.append(
            _Unit(
                equations=equations,
                inputs=list(read),
                outputs=outputs,
                dead=[v for v in read if v not in later],
                dead_after=dead_after[::-1],
                compiled=_compiled(equations, list(read), outputs) if tried else None,
            )
        )
        later = (later - made) | set(read)
    return units[::-1]


def _compiled(
    equations: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Callable[..., tuple[list[Any], Any]]:
    def evaluate(*arrays: Any) -> tuple[list[Any], Any]:
        values = dict(zip(inputs, arrays, strict=True))
        for equation in equations:
            given = [a.val if isinstance(a, Constant) else values[a] for a in equation.invars]
            looped = {"unroll": 1} if equation.primitive.name == "scan" else {}  # compiles faster
            values.update(zip(equation.outvars, _bind(equation, given, **looped), strict=True))
        results = [values[variable] for variable in outputs]
        return results, jnp.array([all_finite(x) for x in results], bool)

    options = COMPILER_OPTIONS.get(jax.default_backend(), {})
    return jax.jit(evaluate, compiler_options=options)


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Constant)]


def _loops(equation: Any) -> bool:
    """Whether it is a loop, or a call with one inside."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        inner = params[_CALLS[name]]
        return any(map(_loops, getattr(inner, "jaxpr", inner).eqns))
    return name in ("scan", "while")
