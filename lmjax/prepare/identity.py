"""What a stage is, as one hash: its config, the code that it runs, and files that it reads."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmjax.annotations import SCALARS, shown
from lmjax.errors import UserError
from lmjax.prepare.files import File
from lmjax.prepare.stage import Reading

# Packages of lmjax whose code decides what a stage gives; what the others hold does not.
_FOLLOWED = ("lmjax.prepare.", "lmjax.data.")


def describe(node: Any, path: str = "stage") -> Any:
    """A config as JSON holds it: dataclasses by their class and fields, functions by their names.

    Raises UserError for an object that is neither: its settings could not be compared.
    """
    if isinstance(node, SCALARS):
        return node
    if isinstance(node, Mapping):
        return {str(key): describe(value, f"{path}.{key}") for key, value in node.items()}
    if isinstance(node, tuple | list):
        return [describe(value, f"{path}.{i}") for i, value in enumerate(node)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = {
            field.name: describe(getattr(node, field.name), f"{path}.{field.name}")
            for field in dataclasses.fields(node)
        }
        return {"_call": _name(type(node)), **fields}
    if callable(node) and hasattr(node, "__qualname__"):
        return {"_ref": _name(node)}
    raise UserError(
        f"{path} is {shown(node)}, whose settings cannot be recorded: make its class a frozen "
        "dataclass."
    )


def identity(node: Any) -> str:
    """A hash that changes with the config of a stage, with its code and with files it reads."""
    held = {
        "config": describe(node),
        "code": {name: code_hash(name) for name in sorted(set(_modules(node)))},
        "files": [_file_hash(path) for path in node.files()] if isinstance(node, Reading) else [],
    }
    return digest(held)


def digest(tree: Any) -> str:
    """The sha256 of a JSON tree, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def code_hash(module: str) -> str:
    """A hash of a module's source, and of those modules of lmjax that it imports."""
    found: dict[str, str] = {}
    queue = [module]
    for name in queue:  # which grows
        if name not in found and (held := _module(name)) is not None:
            found[name] = held[0]
            queue.extend(held[1])
    return digest(found)


@functools.cache
def _module(name: str) -> tuple[str, list[str]] | None:
    """The sha256 of a module's source, and its imports of lmjax; None without a source."""
    loaded = sys.modules.get(name)
    try:
        spec = None if loaded else importlib.util.find_spec(name)
        file = getattr(loaded, "__file__", None) or (spec.origin if spec else None)
        source = Path(file).read_bytes() if file and file.endswith(".py") else None
    except (ImportError, OSError, ValueError):
        return None
    if source is None:
        return None
    return hashlib.sha256(source).hexdigest(), list(_imports(source))


def _imports(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith(_FOLLOWED))


def _modules(node: Any) -> Iterator[str]:
    """The modules of all classes and functions in a config."""
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _modules(value)
    elif isinstance(node, tuple | list):
        for value in node:
            yield from _modules(value)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        yield type(node).__module__
        for field in dataclasses.fields(node):
            yield from _modules(getattr(node, field.name))
    elif callable(node):
        yield str(getattr(node, "__module__", ""))


def _file_hash(path: str) -> str:
    found = hashlib.sha256()
    try:
        with File(path=path, name=path, size=0, version="").open() as file:
            while chunk := file.read(1 << 24):
                found.update(chunk)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be read: {why}. A stage needs it.") from error
    return found.hexdigest()


def _name(target: Any) -> str:
    return f"{target.__module__}:{target.__qualname__}"
