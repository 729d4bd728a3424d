"""What the annotation of a field allows: judging a value, and reading a flag's text as one.

Scalars and sequences of them are judged here; whatever else a function takes, it judges itself.
"""

from __future__ import annotations

import ast
import contextlib
import types
import typing
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from lmjax.errors import UserError

SCALARS = (bool, int, float, str, type(None))


def check(value: Any, annotation: Any, path: str) -> None:
    """Raises UserError unless the annotation allows `value`; `path` names the field."""
    if not _accepts(annotation, value):
        raise UserError(f"{path}: expected {_spell(annotation)}, got {value!r}.")


def parse(text: str, annotation: Any, path: str) -> Any:
    """Reads a flag's text as the first type of the annotation that fits; None first, str last.

    Raises UserError where none does.
    """
    none = (None, type(None))
    for option in sorted(_options(annotation), key=lambda o: (o is str) - (o in none)):
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
            return tuple(parse(part.strip(), member, path) for part in text.split(","))
    raise UserError(f"{path}: expected {_spell(annotation)}, got {text!r}.")


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _accepts(annotation: Any, value: Any) -> bool:
    if annotation in (Any, object) or isinstance(annotation, str | typing.TypeVar):
        return True
    if isinstance(value, ConfigDict):
        return True  # a recorded call: judged once it is made
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
    if origin not in (tuple, list, Sequence):
        return True
    if not isinstance(value, Sequence):
        return False
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return len(inner) == len(value) and all(map(_accepts, inner, value))
    return all(_accepts(inner[0] if inner else Any, item) for item in value)


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
