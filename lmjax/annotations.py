"""What the annotation of a field allows: judging a value, and reading a flag's text as one.

Scalars, sequences and mappings of them are judged here, and of what targets give its class or, by
their names, the members of its protocol.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

from lmjax.errors import UserError

SCALARS = (bool, int, float, str, type(None))
LARGEST = 2**63 - 1  # what JSON's readers, numpy and jax can hold, and what Python can spell
_SHOWN = 200  # characters of a value that a message shows


def check(value: Any, annotation: Any, path: str) -> None:
    """Raises UserError unless the annotation allows `value`; `path` names the field.

    No field takes a whole number of more than 64 bits.
    """
    if not _accepts(annotation, value):
        raise UserError(f"{path}: expected {_spell(annotation)}, got {shown(value)}.")
    if _beyond(value):
        raise UserError(
            f"{path}: expected {_spell(annotation)} of at most 64 bits, got {shown(value)}."
        )


def shown(value: Any) -> str:
    """`repr(value)` on one line, cut where it is long; of any value, even one that has none."""
    try:
        text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
        text = text.replace("\n", " ")
    except (ValueError, RecursionError):  # an integer of thousands of digits; what holds itself
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def parse(text: str, annotation: Any, path: str) -> Any:
    """Reads a flag's text as the first type of the annotation that fits; None first, str last.

    Raises UserError where none does.
    """
    none = (None, type(None))
    options = sorted(_options(annotation), key=lambda o: (o is str) - (o in none))
    for option in options:
        if option in none and text.lower() == "none":
            return None
        if option is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        if option is int and (number := _parse_int(text)) is not None:
            return number
        if option is float:
            with contextlib.suppress(ValueError):
                return float(text)
        if option is str:
            return text
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is typing.Literal and (match := [a for a in inner if str(a) == text]):
            return match[0]
        if origin is Any:
            value = _parse_literal(text)
            return text if value is None and text != "None" else value
        if origin in (tuple, list, Sequence):
            value = _parse_literal(text)
            if isinstance(value, tuple | list) and _accepts(option, value):
                return tuple(value)
            member = inner[0] if inner else Any
            try:
                return tuple(parse(part.strip(), member, path) for part in text.split(","))
            except UserError:
                if option is options[-1]:
                    raise
    raise UserError(f"{path}: expected {_spell(annotation)}, got {shown(text)}.")


def _beyond(value: Any) -> bool:
    """Whether it is, or holds, an integer of more than 64 bits."""
    if isinstance(value, int):
        return not -LARGEST - 1 <= value <= LARGEST
    return isinstance(value, tuple | list) and any(map(_beyond, value))


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _accepts(annotation: Any, value: Any) -> bool:
    if annotation in (Any, object) or isinstance(annotation, str | typing.TypeVar):
        return True
    if isinstance(value, ConfigDict | FieldReference):
        return True  # a recorded call, or computed from other fields: judged once it is made
    if len(options := _options(annotation)) > 1:
        return any(_accepts(option, value) for option in options)
    if annotation is None:
        return value is None
    origin, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in inner)
    if origin is float:  # NaN is no setting
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (bool, str, type(None)):
        return isinstance(value, origin)
    if value is None or isinstance(value, bool | int | float | str):  # a string is no sequence here
        return False
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return False
        return all(_accepts(inner[1] if inner else Any, item) for item in value.values())
    if origin not in (tuple, list, Sequence):
        return _is_one(value, origin)
    if not isinstance(value, Sequence):
        return False
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return len(inner) == len(value) and all(map(_accepts, inner, value))
    return all(_accepts(inner[0] if inner else Any, item) for item in value)


def _is_one(value: Any, kind: Any) -> bool:
    """Whether the value is of a class, or has the members of a protocol (which are not read)."""
    if not isinstance(kind, type):
        return True
    if not getattr(kind, "_is_protocol", False):
        return isinstance(value, kind)
    protocols = [c for c in kind.__mro__ if getattr(c, "_is_protocol", False)]
    members = {m for c in protocols for m in (*vars(c), *vars(c).get("__annotations__", ()))}
    missing = object()
    # A wrapper that gives what it has not itself from what it wraps names that so.
    wrapped = inspect.getattr_static(value, "__wrapped__", missing)
    return all(
        any(inspect.getattr_static(x, m, missing) is not missing for x in (value, wrapped))
        for m in members
        if not m.startswith("_")
    )


def _spell(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(annotation))
    if len(_options(annotation)) > 1:
        return " or ".join(_spell(option) for option in _options(annotation))
    if annotation in (None, type(None)):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _parse_int(text: str) -> int | None:
    """'12', '1_000' and '1e6'; None where the text is no whole number."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _parse_literal(text: str) -> Any:
    """A number, string or sequence in Python's spelling; None where the text is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, (*SCALARS, tuple, list)) else None
