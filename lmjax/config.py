"""Experiments as recorded calls over `ml_collections.ConfigDict`.

A config file holds `get_config()`, which returns `call(Run, task=call(...), ...)`: nothing is made
until `build` makes the recorded calls, innermost first. Between the two, every scalar is a leaf that
a flag may override and that `explain` can print. What a target's signature does not accept is refused
when it is recorded, so a misspelt or mistyped field fails before any device is touched.

A node that stands in several places of the tree is built once, and shared.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from lmjax.errors import UserError, did_you_mean

CALL, REF = "_call", "_ref"
SCALARS = (bool, int, float, str, type(None))


def call(target: Callable[..., Any], /, **kwargs: Any) -> ConfigDict:
    """Records `target(**kwargs)`, with the scalar defaults of its signature as further leaves.

    Raises UserError for a name or a type that the signature does not accept.
    """
    accepted = _parameters(target)
    node = ConfigDict({CALL: _name(target)}, type_safe=False)
    for key, parameter in accepted.items():
        if isinstance(parameter.default, SCALARS):
            node[key] = parameter.default
    for key, value in kwargs.items():
        if key not in accepted:
            raise UserError(f"{_name(target)} has no field {key!r}." + did_you_mean(key, accepted))
        plain = value.get() if isinstance(value, FieldReference) else value
        _check(plain, accepted[key].annotation, f"{_name(target)}: {key}")
        node[key] = _recorded(value, f"{_name(target)}: {key}")
    object.__setattr__(node, "_given", frozenset(kwargs))
    return node


def ref(target: Any) -> ConfigDict:
    """Records `target` itself, to be passed on and not called."""
    return ConfigDict({REF: _name(target)})


def build(node: Any) -> Any:
    """Makes the recorded calls below `node`, innermost first, and returns the outermost result.

    Raises UserError with the field's path where a target is missing, a required field is absent, or
    the target itself refuses its values.
    """
    return _build(node, "config", {})


def build_and_resolve(node: ConfigDict) -> tuple[Any, dict[str, Any]]:
    """Builds, and returns with the result the config as a plain tree (`to_dict`).

    In the tree a recorded call that gave a scalar (a vocabulary's size, counted in the data) is
    replaced by that scalar, so that parts of it can be built again without the rest.
    """
    memo: dict[int, Any] = {}
    built = _build(node, "config", memo)
    return built, to_dict(node, {k: v for k, v in memo.items() if isinstance(v, SCALARS)})


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Loads `FILE.py[:VARIANT]` and applies the variant's and then the given overrides.

    Args:
      spec: path of a file that defines `get_config()` and, if it has variants, `VARIANTS`: a mapping
        from a variant's name to overrides ({"steps": 8, "task.model.num_layers": 2}).
      overrides: dotted field to value. Strings are read by the field's type, as flags are.
    """
    path, _, variant = spec.partition(":")
    module = _import_file(path)
    variants: Mapping[str, Mapping[str, Any]] = getattr(module, "VARIANTS", {})
    if variant and variant not in variants:
        raise UserError(f"{path} has no variant {variant!r}." + did_you_mean(variant, variants))
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} defines no get_config(): a config file must.")
    config = module.get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() must return call(...), and returned {config!r}.")
    for name, value in variants.get(variant, {}).items():
        override(config, name, value)
    before, flags = dict(leaves(config)), dict(overrides or {})
    for name, value in flags.items():
        override(config, name, value)
    # A flag also speaks for the leaves that share its node or FieldReference, and for its members.
    changed = {name for name, value in leaves(config) if before.get(name, ...) != value}
    named = {name for name, _ in leaves(config) if any(f"{name}.".startswith(f"{f}.") for f in flags)}
    object.__setattr__(config, "_flags", frozenset(changed | named))
    return config


def override(config: ConfigDict, name: str, value: Any) -> None:
    """Sets the field `name` ('task.model.num_layers'); a string is read by the field's type."""
    *parents, last = name.split(".")
    node, path, above = config, "config", []
    for key in parents:
        above.append((node, key))
        node, path = _child(node, key, path), f"{path}.{key}"
    current = _child(node, last, path)
    path = f"{path}.{last}"
    if isinstance(current, ConfigDict) and not isinstance(value, ConfigDict):
        raise UserError(
            f"{path} is not a single value; set one of its fields: {', '.join(_fields(current))}."
        )
    annotation = _annotation(node, last, current)
    if isinstance(value, str):
        value = _parse(value, annotation, path)
    _check(value, annotation, path)
    while isinstance(node, tuple | list):  # its parent gets another with this member
        value = tuple(value if str(i) == last else item for i, item in enumerate(node))
        node, last = above.pop()
    node[last] = value


def to_dict(node: Any, known: Mapping[int, Any] | None = None) -> Any:
    """The config as plain dicts, lists and scalars: what JSON can hold and `from_dict` reads.

    `known` gives values for some of its nodes, by their `id`.
    """
    if known and id(node) in known:
        return known[id(node)]
    if isinstance(node, ConfigDict | Mapping):
        return {key: to_dict(node[key], known) for key in node}
    if isinstance(node, tuple | list):
        return [to_dict(item, known) for item in node]
    return node


def from_dict(tree: Mapping[str, Any]) -> ConfigDict:
    """Inverse of `to_dict`. Equal subtrees become one node, so that they are built once."""
    seen: dict[str, ConfigDict] = {}

    def convert(node: Any) -> Any:
        if isinstance(node, Mapping):
            key = json.dumps(node, sort_keys=True)
            if key not in seen:
                made = ConfigDict(type_safe=False)
                for name, value in node.items():
                    made[name] = convert(value)
                seen[key] = made
            return seen[key]
        return tuple(convert(item) for item in node) if isinstance(node, list) else node

    return convert(tree)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) of every leaf; the target of a call is the leaf `path._call`."""
    tree = to_dict(node) if isinstance(node, ConfigDict) else node
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def explain(config: ConfigDict) -> list[tuple[str, Any, str]]:
    """Lists (field, value, source) of every leaf; the source is 'default', 'file' or 'flag'."""
    flags = getattr(config, "_flags", frozenset())
    rows = []
    for path, value in leaves(config):
        *parents, last = path.split(".")
        if last in (CALL, REF):
            path, last = ".".join(parents), ""
        node: Any = config
        for key in parents:
            node = node[key] if isinstance(node, ConfigDict) else node[int(key)]
        default = _default(node, last)
        given = last in getattr(node, "_given", frozenset())
        source = "file" if given or default != value or not last else "default"
        rows.append((path or "config", value, "flag" if path in flags else source))
    return rows


def _build(node: Any, path: str, memo: dict[int, Any]) -> Any:
    if isinstance(node, tuple | list):
        return tuple(_build(item, f"{path}.{i}", memo) for i, item in enumerate(node))
    if not isinstance(node, ConfigDict):
        return node
    if id(node) not in memo:
        if REF in node:
            memo[id(node)] = _resolve(node[REF], path)
        elif CALL in node:
            memo[id(node)] = _make(node, path, memo)
        else:
            memo[id(node)] = {key: _build(node[key], f"{path}.{key}", memo) for key in node}
    return memo[id(node)]


def _make(node: ConfigDict, path: str, memo: dict[int, Any]) -> Any:
    target = _resolve(node[CALL], path)
    accepted = _parameters(target)
    kwargs = {k: _build(node[k], f"{path}.{k}", memo) for k in node if k != CALL}
    for key, value in kwargs.items():
        if key not in accepted:
            raise UserError(f"{path} has no field {key!r}." + did_you_mean(key, accepted))
        _check(value, accepted[key].annotation, f"{path}.{key}")
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in kwargs:
            raise UserError(f"{path} needs the field {key!r} of {node[CALL]}, which is not given.")
    try:
        return target(**kwargs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {node[CALL]} refused its values: {error}") from error


def _recorded(value: Any, path: str) -> Any:
    """The value as a config holds it: what JSON can spell, and recorded calls."""
    if isinstance(value, (ConfigDict, FieldReference, *SCALARS)):
        return value
    if isinstance(value, tuple | list):
        return tuple(_recorded(item, path) for item in value)
    if isinstance(value, Mapping):
        node = ConfigDict(type_safe=False)
        for key, item in value.items():
            node[key] = _recorded(item, path)
        return node
    raise UserError(f"{path}: a config cannot hold {value!r}; record it by call() or ref().")


def _import_file(path: str) -> types.ModuleType:
    if not Path(path).is_file():
        near = [str(p) for p in Path(path).parent.glob("*.py")] if Path(path).parent.is_dir() else []
        raise UserError(f"no config file {path!r}." + did_you_mean(path, near))
    spec = importlib.util.spec_from_file_location(f"lmjax_config_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name(target: Any) -> str:
    if "<" in target.__qualname__:
        raise UserError(f"{target.__qualname__} is local: a config records module-level names only.")
    return f"{target.__module__}:{target.__qualname__}"


def _resolve(name: str, path: str) -> Any:
    module, _, qualname = name.partition(":")
    try:
        return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise UserError(f"{path}: cannot import {name!r}: {error}") from error


@functools.lru_cache(maxsize=None)
def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword parameters of `target`, annotations resolved; linen's own fields left out."""
    try:
        hints = typing.get_type_hints(target)
    except NameError:  # an annotation that only a type checker can see
        hints = {}
    linen = any(c.__module__.startswith("flax.linen") for c in getattr(target, "__mro__", ()))
    return {
        name: p.replace(annotation=hints.get(name, Any))
        for name, p in inspect.signature(target).parameters.items()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        and not (linen and name in ("parent", "name"))
    }


def _fields(node: Any) -> list[str]:
    if isinstance(node, ConfigDict):
        return [key for key in node if key not in (CALL, REF)]
    return [str(i) for i in range(len(node))]


def _child(node: Any, key: str, path: str) -> Any:
    if not isinstance(node, ConfigDict | tuple | list):
        raise UserError(f"{path} is the value {node!r}; it has no field {key!r}.")
    if key not in _fields(node):
        raise UserError(f"{path} has no field {key!r}." + did_you_mean(key, _fields(node)))
    return node[key] if isinstance(node, ConfigDict) else node[int(key)]


def _annotation(node: Any, key: str, current: Any) -> Any:
    if isinstance(node, ConfigDict) and CALL in node:
        parameter = _parameters(_resolve(node[CALL], key)).get(key)
        return parameter.annotation if parameter else Any
    # A member of a sequence or mapping: of the type that it has; the target judges it once built.
    return {int: int | float, type(None): Any}.get(type(current), type(current))


def _default(node: Any, key: str) -> Any:
    if isinstance(node, ConfigDict) and CALL in node:
        parameter = _parameters(_resolve(node[CALL], key)).get(key)
        return parameter.default if parameter else inspect.Parameter.empty
    return inspect.Parameter.empty


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


def _check(value: Any, annotation: Any, path: str) -> None:
    """Raises unless the annotation allows `value`. Only scalars and sequences of them are judged."""
    if not _accepts(annotation, value):
        raise UserError(f"{path}: expected {_spell(annotation)}, got {value!r}.")


def _spell(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(annotation))
    if len(_options(annotation)) > 1:
        return " or ".join(_spell(option) for option in _options(annotation))
    if annotation in (None, type(None)):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _parse(text: str, annotation: Any, path: str) -> Any:
    """Reads a flag's text as the first type of the annotation that fits; None first, str last."""
    for option in sorted(_options(annotation), key=lambda o: (o is str) - (o in (None, type(None)))):
        if option in (None, type(None)) and text.lower() == "none":
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
            return tuple(_parse(part.strip(), member, path) for part in text.split(","))
    raise UserError(f"{path}: expected {_spell(annotation)}, got {text!r}.")


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
