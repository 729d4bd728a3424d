"""Optimizers and learning rates that differ between parameters, by regex over their paths."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from lmjax.errors import UserError, check_regex
from lmjax.optim.presets import average_params
from lmjax.sharding import Boxed

_LISTED = 8


def by_path(
    *,
    optimizers: Sequence[tuple[str, optax.GradientTransformation]],
    clip_norm: float | None = None,
    average: float | None = None,
) -> optax.GradientTransformation:
    """An optimizer for each group of parameters.

    The learning rate that is reported is that of the first group; those of others follow as
    `learning_rate_2`, ...

    Args:
      optimizers: (regex over parameter paths, optimizer): the first regex that is found in its path
        says which updates a parameter. End with "" for all others.
      clip_norm: the global norm of all gradients is at most this, before they are parted. An
        optimizer's own `clip_norm` is of its group: set it to None.
      average: decay of an exponential average of all parameters, which evaluation then uses. The
        optimizers may have none of their own.

    Raises:
      UserError: for no regex; when it starts, for a regex that no parameter is left for, for a
        parameter that none is found in, and for an optimizer that averages.
    """
    patterns = [pattern for pattern, _ in optimizers]
    if not patterns:
        raise UserError("optimizers is empty: give (regex, optimizer), at least one.")
    for pattern in patterns:
        check_regex("optimizers", pattern)

    def labels(params: Any) -> Any:
        found = _first(patterns, params)
        if lost := [path for path, index in found.items() if index is None]:
            raise UserError(
                f"optimizers: no regex is found in {_some(lost)}. Add ('', optimizer) at the end "
                "for all that no other names."
            )
        _check_used("optimizers", patterns, found)
        return _by_leaf(params, lambda path: f"{found[path]:04d}")

    groups = {f"{i:04d}": optimizer for i, (_, optimizer) in enumerate(optimizers)}
    return _framed(optax.partition(groups, labels), clip_norm=clip_norm, average=average)


def multiplied(
    *,
    optimizer: optax.GradientTransformation,
    factors: Sequence[tuple[str, float]],
    average: float | None = None,
) -> optax.GradientTransformation:
    """An optimizer whose learning rate is another one for some parameters.

    What is multiplied is the update, decoupled weight decay with it, as a learning rate would. The
    one that is reported is the optimizer's.

    Args:
      optimizer: may not average the parameters.
      factors: (regex over parameter paths, factor): the first regex that is found in its path;
        parameters in whose path none is keep their learning rate.
      average: decay of an exponential average of the parameters, which evaluation then uses.

    Raises:
      UserError: for a factor that is negative or not finite; when it starts, for a regex that no
        parameter is left for, and for an optimizer that averages.
    """
    patterns = [pattern for pattern, _ in factors]
    if not patterns:
        raise UserError("factors is empty: give (regex, factor), at least one.")
    for pattern, factor in factors:
        check_regex("factors", pattern)
        if not 0 <= factor < math.inf:
            raise UserError(
                f"factors: {pattern!r} has {factor}: must not be negative, and finite. To leave "
                "parameters as they are, leave them out of trainable."
            )

    def scale(updates: Any) -> Any:
        found = _first(patterns, updates)
        _check_used("factors", patterns, found)

        def of(path: Any, update: Any) -> Any:
            index = found[_name(path)]
            return update if index is None else factors[index][1] * update

        return jax.tree_util.tree_map_with_path(of, updates)

    def init(params: Any) -> optax.EmptyState:
        _check_used("factors", patterns, _first(patterns, params))
        return optax.EmptyState()

    scaled = optax.GradientTransformation(
        init, lambda updates, state, params=None: (scale(updates), state)
    )
    return _framed(optax.chain(optimizer, scaled), clip_norm=None, average=average)


def _framed(
    method: optax.GradientTransformation, *, clip_norm: float | None, average: float | None
) -> optax.GradientTransformation:
    """Clipping before a method and an average after it; the method may have no average."""
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm is {clip_norm}: must be positive, or None for no clipping.")
    if average is not None and not 0 < average < 1:
        raise UserError(f"average is {average}: must be above 0 and below 1, or None.")

    def init(params: Any) -> Any:
        state = method.init(params)
        if optax.tree_utils.tree_get_all_with_path(state, "averaged_params"):
            raise UserError(
                "an optimizer inside of another one averages the parameters, of which it does not "
                "see all updates: set its average to None, and that of the outer one."
            )
        return state

    links = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    links.append(optax.GradientTransformation(init, method.update))
    if average:
        links.append(average_params(average))
    return optax.chain(*links)


def _first(patterns: Sequence[str], params: Any) -> dict[str, int | None]:
    """Which regex is the first to be found in the path of each parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    return {
        name: next((i for i, pattern in enumerate(patterns) if re.search(pattern, name)), None)
        for name in (_name(path) for path, _ in leaves)
    }


def _check_used(what: str, patterns: Sequence[str], found: dict[str, int | None]) -> None:
    """Raises UserError for a regex that no parameter is left for."""
    for index, pattern in enumerate(patterns):
        if index in found.values():
            continue
        if any(re.search(pattern, path) for path in found):
            raise UserError(
                f"{what}: whatever {pattern!r} is found in, an earlier regex is found in too: the "
                "first counts. Put it before them."
            )
        words = {word for path in found for word in path.split("/")}
        near = difflib.get_close_matches(pattern, [*found, *words], n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"{what}: {pattern!r} is found in the path of no parameter that trains.{hint} "
            f"There are: {_some(list(found))}."
        )


def _by_leaf(params: Any, function: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function(_name(path)), params, is_leaf=_is_box
    )


def _is_box(x: Any) -> bool:
    return isinstance(x, Boxed)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
