"""A config as a tree: what makes it unsound, and where its nodes lie."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, FieldReference

from lmjax.errors import UserError

DEEPEST = 64  # levels of a config: more than any has, and fewer than Python's stack holds


def check_tree(root: Any) -> None:
    """Raises UserError where a node holds itself, lies too deep, or cannot be computed."""
    sound: set[int] = set()

    def visit(node: Any, path: str, above: tuple[int, ...]) -> None:
        if id(node) in above:
            raise UserError(f"{path} holds itself: a config is a tree, whose nodes may be shared.")
        if len(above) > DEEPEST:
            raise UserError(too_deep(path))
        if not isinstance(node, ConfigDict | tuple | list) or id(node) in sound:
            return
        for key in list(node) if isinstance(node, ConfigDict) else range(len(node)):
            visit(member(node, key, path), f"{path}.{key}", (*above, id(node)))
        sound.add(id(node))

    visit(root, "config", ())


def too_deep(path: str) -> str:
    """The message for a tree that goes deeper than any config does."""
    return f"{path} is nested deeper than the {DEEPEST} levels that a config may have."


def member(node: Any, key: Any, path: str) -> Any:
    """A node's member, computed where it is an expression of other fields."""
    try:
        return node[key]
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(_not_computed(f"{path}.{key}", error)) from error


def computed(value: Any, path: str) -> Any:
    """A value, computed where it is an expression of other fields."""
    try:
        return value.get() if isinstance(value, FieldReference) else value
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(_not_computed(path, error)) from error


def _not_computed(path: str, error: Exception) -> str:
    return (
        f"{path} cannot be computed from the fields that it refers to: {error}. Change those, or "
        "set it outright."
    )


def paths_of(root: Any) -> dict[int, str]:
    """The shortest path to each node, by id: of a node that is shared, the one that errors name."""
    paths: dict[int, str] = {}
    queue: list[tuple[Any, str]] = [(root, "config")]
    for node, path in queue:  # which grows
        if isinstance(node, ConfigDict) and id(node) not in paths:
            paths[id(node)] = path
            queue.extend((node[key], f"{path}.{key}") for key in node)
        elif isinstance(node, tuple | list):
            queue.extend((item, f"{path}.{i}") for i, item in enumerate(node))
    return paths
