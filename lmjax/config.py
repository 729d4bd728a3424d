"""Experiments as recorded calls over `ml_collections.ConfigDict`.

A config file holds `get_config()`, which returns `call(Run, task=call(...), ...)`: nothing is made
until `build` makes the recorded calls, innermost first. Between the two, every scalar is a leaf
that a flag may override and that `explain` can print. What a target's signature does not accept is
refused when it is recorded, so a misspelt or mistyped field fails before any device is touched.

A node that stands in several places of the tree is built once, and shared. A target that returns a
recorded call stands for it: that one is built in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from lmjax.annotations import SCALARS, check, parse, shown
from lmjax.config_file import import_file, run_file
from lmjax.config_tree import check_tree, computed, member, paths_of, too_deep
from lmjax.errors import UserError, did_you_mean

CALL, REF = "_call", "_ref"


def call(target: Callable[..., Any], /, **kwargs: Any) -> ConfigDict:
    """Records `target(**kwargs)`, with the defaults of its signature that flags can reach.

    Those are scalars, and of a dataclass the fields that are made by dataclasses: `call(Run, ...)`
    has a `layout`, though none is given.

    Raises UserError for a name or a type that the signature does not accept.
    """
    accepted = _parameters(target)
    node = ConfigDict({CALL: _name(target)}, type_safe=False)
    for key, parameter in accepted.items():
        if isinstance(parameter.default, SCALARS):
            node[key] = parameter.default
    for name, made_by in _factories(target).items():
        if name not in kwargs:
            node[name] = call(made_by)
    for key, value in kwargs.items():
        if key not in accepted:
            raise UserError(f"{_name(target)} has no field {key!r}." + did_you_mean(key, accepted))
        plain = computed(value, f"{_name(target)}: {key}")
        check(plain, accepted[key].annotation, f"{_name(target)}: {key}")
        node[key] = _recorded(value, f"{_name(target)}: {key}")
    object.__setattr__(node, "_given", frozenset(kwargs))
    return node


def _factories(target: Any) -> dict[str, Any]:
    """The dataclasses that make fields of a dataclass where none are given, by field."""
    if not dataclasses.is_dataclass(target):
        return {}
    made = {field.name: field.default_factory for field in dataclasses.fields(target)}
    return {name: factory for name, factory in made.items() if dataclasses.is_dataclass(factory)}


def ref(target: Any) -> ConfigDict:
    """Records `target` itself, to be passed on and not called."""
    return ConfigDict({REF: _name(target)})


def build(node: Any) -> Any:
    """Makes the recorded calls below `node`, innermost first, and returns the outermost result.

    Raises UserError with the field's path where a target is missing, a required field is absent, or
    the target itself refuses its values.
    """
    check_tree(node)
    return _build(node, "config", paths_of(node), {}, {})


def build_and_resolve(node: ConfigDict) -> tuple[Any, dict[str, Any]]:
    """Builds, and returns with the result the config as a plain tree (`to_dict`).

    In the tree a recorded call that gave a scalar (a vocabulary's size, counted in the data) or
    another recorded call (the model of a folder of weights) is replaced by that, so that parts of
    it can be built again without the rest.
    """
    check_tree(node)
    memo: dict[int, Any] = {}
    given: dict[int, ConfigDict] = {}
    built = _build(node, "config", paths_of(node), memo, given)
    known = {k: v for k, v in memo.items() if isinstance(v, SCALARS)}
    for key, made in reversed(given.items()):  # what another one holds comes after it
        known[key] = to_dict(made, known)
    return built, to_dict(node, known)


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Loads `FILE.py[:VARIANT]` and applies the variant's and then the given overrides.

    Args:
      spec: path of a file that defines `get_config()` and, if it has variants, `VARIANTS`: a
        mapping from a variant's name to overrides ({"steps": 8, "task.model.num_layers": 2}).
      overrides: dotted field to value. Strings are read by the field's type, as flags are.
    """
    path, _, variant = spec.partition(":")
    module = import_file(path)
    variants: Mapping[str, Mapping[str, Any]] = getattr(module, "VARIANTS", {})
    if not isinstance(variants, Mapping) or not all(
        isinstance(name, str) and isinstance(changes, Mapping) for name, changes in variants.items()
    ):
        raise UserError(
            f"VARIANTS of {path} is {shown(variants)}: write a mapping from each variant's name to "
            "its overrides, as {'small': {'steps': 8}}."
        )
    if variant and variant not in variants:
        raise UserError(f"{path} has no variant {variant!r}." + did_you_mean(variant, variants))
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} defines no get_config(): a config file must.")
    config = run_file(path, module.get_config)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() must return call(...), and returned {shown(config)}."
        )
    check_tree(config)
    for name, value in variants.get(variant, {}).items():
        override(config, name, value)
    before, flags = dict(leaves(config)), dict(overrides or {})
    for name, value in flags.items():
        override(config, name, value)
    check_tree(config)
    # A flag also speaks for its members, and for leaves that share its node or FieldReference.
    stems = tuple(f"{name}." for name in flags)
    after = leaves(config)
    spoken = {k for k, v in after if f"{k}.".startswith(stems) or before.get(k, ...) != v}
    object.__setattr__(config, "_flags", frozenset(spoken))
    return config


def override(config: ConfigDict, name: str, value: Any) -> None:
    """Sets the field `name` ('task.model.num_layers'); a string is read by the field's type."""
    if not isinstance(name, str):
        raise UserError(f"{shown(name)} names no field: write its path, as 'data.length'.")
    *parents, last = name.split(".")
    node, path, above = config, "config", []
    for key in parents:
        above.append((node, key))
        node, path = _child(node, key, path), f"{path}.{key}"
    current = _child(node, last, path)
    path = f"{path}.{last}"
    if isinstance(current, ConfigDict) and not isinstance(value, ConfigDict | tuple | list):
        raise UserError(
            f"{path} is not a single value; set one of its fields: {', '.join(_fields(current))}."
        )
    annotation = _annotation(node, last, current)
    if isinstance(value, str):
        value = parse(value, annotation, path)
    check(value, annotation, path)
    value = _recorded(value, path)
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
    """Inverse of `to_dict`. Equal subtrees become one node, so that they are built once.

    Raises UserError for what no config gives: names that cannot be fields, and endless nesting.
    """
    seen: dict[str, ConfigDict] = {}

    def convert(node: Any) -> Any:
        if isinstance(node, Mapping):
            key = json.dumps(node, sort_keys=True)
            if key not in seen:
                made = ConfigDict(type_safe=False, sort_keys=False)
                for name, value in node.items():
                    _set(made, name, convert(value), "config")
                seen[key] = made
            return seen[key]
        return tuple(convert(item) for item in node) if isinstance(node, list) else node

    try:
        made: ConfigDict = convert(tree)
    except RecursionError as error:
        raise UserError(too_deep("config")) from error
    return made


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
    flags: frozenset[str] = getattr(config, "_flags", frozenset())
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


def _build(
    node: Any,
    path: str,
    paths: Mapping[int, str],
    memo: dict[int, Any],
    given: dict[int, ConfigDict],
) -> Any:
    """Builds what is not in `memo` yet; `given` gets the recorded calls that calls returned."""

    def inner(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        return {key: _build(item, f"{path}.{key}", paths, memo, given) for key, item in items}

    if isinstance(node, tuple | list):
        return tuple(inner(enumerate(node)).values())
    if not isinstance(node, ConfigDict):
        return node
    if id(node) not in memo:
        path = paths[id(node)]
        if REF in node:
            memo[id(node)] = _resolve(node[REF], path)
        elif CALL in node:
            kwargs = inner((key, node[key]) for key in node if key != CALL)
            made = _make(node[CALL], kwargs, path)
            if isinstance(made, ConfigDict):
                check_tree(made)
                given[id(node)] = made
                inside = {
                    key: path + at.removeprefix("config") for key, at in paths_of(made).items()
                }
                made = _build(made, path, inside, memo, given)
            memo[id(node)] = made
        else:
            memo[id(node)] = inner(node.items())
    return memo[id(node)]


def _make(name: str, kwargs: Mapping[str, Any], path: str) -> Any:
    target = _resolve(name, path)
    try:
        accepted = _parameters(target)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {name!r} is nothing that a config can call: {error}.") from error
    for key, value in kwargs.items():
        if key not in accepted:
            raise UserError(f"{path} has no field {key!r}." + did_you_mean(key, accepted))
        check(value, accepted[key].annotation, f"{path}.{key}")
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in kwargs:
            raise UserError(f"{path} needs the field {key!r} of {name}, which is not given.")
    try:
        return target(**kwargs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{path}: {name} refused its values: {why}") from error


def _recorded(value: Any, path: str) -> Any:
    """The value as a config holds it: what JSON can spell, and recorded calls."""
    if isinstance(value, (ConfigDict, FieldReference, *SCALARS)):
        return value
    if isinstance(value, tuple | list):
        if any(isinstance(item, FieldReference) for item in value):
            raise UserError(f"{path}: a FieldReference may be a field, not a member of a sequence.")
        return tuple(_recorded(item, path) for item in value)
    if isinstance(value, Mapping):
        node = ConfigDict(type_safe=False, sort_keys=False)  # stages run in the order given
        for key, item in value.items():
            _set(node, key, _recorded(item, path), path)
        return node
    raise UserError(f"{path}: a config cannot hold {shown(value)}; record it by call() or ref().")


def _set(node: ConfigDict, key: Any, value: Any, path: str) -> None:
    """Sets a member; raises UserError for a name that flags could not reach, or that is taken."""
    if not isinstance(key, str) or "." in key or hasattr(ConfigDict, key):
        raise UserError(f"{path}: no member can be named {shown(key)}; choose a word without dots.")
    node[key] = value


def _name(target: Any) -> str:
    if not hasattr(target, "__qualname__") or not getattr(target, "__module__", None):
        raise UserError(f"{shown(target)} has no name that a config could record.")
    if "<" in target.__qualname__:
        raise UserError(f"{target.__qualname__} is local: a config records module-level names.")
    return f"{target.__module__}:{target.__qualname__}"


def _resolve(name: str, path: str) -> Any:
    if not isinstance(name, str):
        raise UserError(f"{path}: {shown(name)} names no target: write 'package.module:name'.")
    module, _, qualname = name.partition(":")
    try:
        return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot import {name!r}: {error}") from error


@functools.cache
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
        raise UserError(f"{path} is the value {shown(node)}; it has no field {key!r}.")
    if key not in _fields(node):
        raise UserError(f"{path} has no field {key!r}." + did_you_mean(key, _fields(node)))
    return member(node, key if isinstance(node, ConfigDict) else int(key), path)


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
