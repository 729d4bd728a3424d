"""Weights that are set to zero by their size, and stay so while training goes on."""

# Shape legend: N the weights of a group.

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.errors import UserError, check_regex, did_you_mean
from lmjax.sharding import Boxed

Scope = Literal["matrix", "global"]
KERNELS = r"(?<!router_)kernel$"
_STACKS = ("layers", "experts")  # axes that stack matrices


@struct.dataclass
class Mask:
    """Which weights of a parameter are kept: 1, or 0 (uint8), and what its axes are.

    Args:
      kept: of the parameter's shape.
      stacked: axes that stack matrices.
      inputs: axes over which a product sums.
    """

    kept: Any
    stacked: tuple[int, ...] = struct.field(pytree_node=False)
    inputs: tuple[int, ...] = struct.field(pytree_node=False)


class PruningState(NamedTuple):
    """The updates made so far, a tree of masks, and the state of the wrapped optimizer."""

    step: jax.Array
    masks: dict[str, Any]
    optimizer: Any


def pruned(
    *,
    optimizer: optax.GradientTransformation,
    where: str = KERNELS,
    sparsity: float = 0.0,
    pattern: str = "",
    begin: int = 0,
    end: int = 0,
    every: int = 100,
    scope: Scope = "matrix",
    keep_zeros: bool = False,
) -> optax.GradientTransformation:
    """An optimizer that sets the smallest weights to zero, more and more of them.

    Source: Zhu & Gupta, arXiv:1710.01878: the share of zeros follows `cubic`; what is pruned gets
    no update any more and stays zero. What is chosen is |w| after a step's update. With a `pattern`
    n:m, of every m weights along the inputs of a product the n largest stay (Mishra et al.,
    arXiv:2104.08378, section 3): at once at step `begin`, or with an `end` little by little. The
    share of zeros then follows `cubic` up to (m - n) / m, and goes to the smallest of the weights
    that the pattern would drop now (`keep_towards`). Kao et al., arXiv:2209.07617, find such ways
    better than one step; theirs has the same share everywhere, n falling from m - 1.

    Masks are arrays of one byte a weight in the optimizer's state: split as the parameters, and in
    the checkpoints.

    Args:
      optimizer: what updates the parameters; may not average them.
      where: regex over parameter paths: those in which it is found are pruned.
      sparsity: the share of zeros at step `end`; 0 with a pattern, or for `keep_zeros` alone.
      pattern: '2:4' or another one; '' for none.
      begin: the step (the first is 1) at which pruning begins; 0 is as 1.
      end: the step at which it is over; 0, with a pattern: at `begin`.
      every: steps between two choices.
      scope: whether the share is that of each matrix (of each layer), or of all together.
      keep_zeros: what starts as zero stays so: training goes on from weights that are pruned.

    Raises:
      UserError: for numbers that make no schedule; when it starts, where no parameter that trains
        is meant, where inputs do not divide by m, and for an optimizer that averages.
    """
    check_regex("where", where)
    n_of_m = pattern_of(pattern)
    gradual, most = end > 0, 1 - n_of_m[0] / n_of_m[1] if n_of_m else sparsity
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity is {sparsity}: must be at least 0 and below 1.")
    if (sparsity > 0) == bool(n_of_m) and not (keep_zeros and not n_of_m):
        raise UserError(
            f"sparsity is {sparsity} and pattern {pattern!r}: give one of them (or keep_zeros)."
        )
    if begin < 0 or every < 1 or ((sparsity or end) and end <= begin):
        raise UserError(
            f"begin is {begin}, end {end} and every {every}: begin may not be negative, end must "
            "be above it (or 0 with a pattern), and every at least 1."
        )
    if scope not in get_args(Scope):
        raise UserError(f"scope is {scope!r}." + did_you_mean(str(scope), get_args(Scope)))

    def init(params: Any) -> PruningState:
        found = {path: x for path, x in _by_path(params).items() if re.search(where, path)}
        if not found:
            some = ", ".join(list(_by_path(params))[:8])
            raise UserError(f"where={where!r} is found in no parameter that trains: {some}, ...")
        inner = optimizer.init(params)
        if optax.tree_utils.tree_get_all_with_path(inner, "averaged_params"):
            raise UserError(
                "pruned: the optimizer averages the parameters, and the average of a pruned "
                "weight is not zero: set its average to None."
            )
        masks = {path: _mask(path, x, n_of_m, keep_zeros) for path, x in found.items()}
        return PruningState(jnp.zeros((), jnp.int32), unflatten_dict(masks, sep="/"), inner)

    def update(updates: Any, state: PruningState, params: Any = None) -> tuple[Any, PruningState]:
        updates, inner = optimizer.update(updates, state.optimizer, params)
        step = state.step + 1
        change, own = _by_path(updates), _by_path(params)
        old = flatten_dict(state.masks, sep="/")

        def chosen() -> dict[str, Any]:
            scores = {k: jnp.abs(own[k] + change[k]) * m.kept for k, m in old.items()}
            stacked = {k: m.stacked for k, m in old.items()}
            share = cubic(step, sparsity=most, begin=begin, end=end) if gradual else most
            if n_of_m is None:
                kept = keep_largest(scores, share, stacked=stacked, scope=scope)
            else:
                kept = {k: keep_pattern(x, n_of_m, axes=old[k].inputs) for k, x in scores.items()}
                if gradual:
                    more = keep_towards(kept, scores, share, stacked=stacked, scope=scope)
                    # At the end exactly, however share * N is rounded.
                    kept = {k: jnp.where(step < end, more[k], x) for k, x in kept.items()}
            return {k: x.astype(jnp.uint8) * old[k].kept for k, x in kept.items()}

        first = max(begin, 1)
        if n_of_m and not gradual:
            now = step == first
        elif most:
            due = ((step - begin) % every == 0) | (step == end)
            now = due & (step >= first) & (step <= end)
        else:
            now = jnp.asarray(False)
        kept = jax.lax.cond(now, chosen, lambda: {k: m.kept for k, m in old.items()})
        masks = {k: m.replace(kept=kept[k]) for k, m in old.items()}

        def masked(path: Any, update: jax.Array) -> jax.Array:
            name = _name(path)
            return jnp.where(kept[name] > 0, update, -own[name]) if name in kept else update

        updates = jax.tree_util.tree_map_with_path(masked, updates)
        return updates, PruningState(step, unflatten_dict(masks, sep="/"), inner)

    return optax.GradientTransformation(init, update)


def cubic(step: Any, *, sparsity: float, begin: int, end: int) -> Any:
    """The share of zeros at a step; Zhu & Gupta, arXiv:1710.01878, equation 1, from 0.

    sparsity * (1 - (1 - (step - begin) / (end - begin))^3), and `sparsity` itself from `end` on.
    """
    left = 1 - (jnp.clip(step, begin, end) - begin) / (end - begin)
    return sparsity * (1 - left**3)


def pattern_of(text: str) -> tuple[int, int] | None:
    """'2:4' as (2, 4): 2 of every 4 stay; '' as None. Raises UserError for anything else."""
    if not text:
        return None
    match = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"pattern is {text!r}: write how many of how many stay, as '2:4'.")
    return int(match[1]), int(match[2])


def keep_largest(
    scores: dict[str, Any], share: Any, *, stacked: dict[str, tuple[int, ...]], scope: Scope
) -> dict[str, Any]:
    """Masks that drop the smallest scores: floor(share * N) of N, and what equals the last of them.

    N are the weights of a matrix, whose axes are all that are not `stacked`, or of all together.
    """
    if scope == "global":
        flat_N = jnp.concatenate([x.ravel() for x in scores.values()])
        limit = _limit(flat_N, share)
        return {path: x > limit for path, x in scores.items()}
    kept = {}
    for path, x in scores.items():
        lead = stacked[path]
        moved = jnp.moveaxis(x, lead, tuple(range(len(lead))))
        flat_N = moved.reshape(*moved.shape[: len(lead)], -1)
        limit = _limit(flat_N, share)
        limit = limit.reshape(*limit.shape, *[1] * (x.ndim - len(lead)))
        kept[path] = jnp.moveaxis(moved > limit, tuple(range(len(lead))), lead)
    return kept


def keep_towards(
    spared: dict[str, Any],
    scores: dict[str, Any],
    share: Any,
    *,
    stacked: dict[str, tuple[int, ...]],
    scope: Scope,
) -> dict[str, Any]:
    """Masks as those of `keep_largest` that drop nothing of what the masks `spared` keep.

    Up to the share that `spared` drops; then they are `spared`.
    """
    rest = {path: jnp.where(spared[path], jnp.inf, x) for path, x in scores.items()}
    kept = keep_largest(rest, share, stacked=stacked, scope=scope)
    return {path: x | spared[path] for path, x in kept.items()}


def keep_pattern(score: Any, pattern: tuple[int, int], *, axes: Sequence[int]) -> Any:
    """A mask of the n largest of every m scores along `axes`, joined; of equal ones the first."""
    n, m = pattern
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(score, axes, last)
    groups = moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1, m)
    rank = jnp.argsort(jnp.argsort(-groups, axis=-1, stable=True), axis=-1, stable=True)
    return jnp.moveaxis((rank < n).reshape(moved.shape), last, axes)


def axes_of(names: Sequence[str | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(axes that stack matrices, axes of the inputs) of a kernel, by its axes' names.

    Inputs are first: "embed" alone, or all axes up to an "embed" that is last; else the first one.
    """
    stacked = tuple(i for i, name in enumerate(names) if name in _STACKS)
    rest = [i for i in range(len(names)) if i not in stacked]
    many = len(rest) > 1 and names[rest[-1]] == "embed" != names[rest[0]]
    return stacked, tuple(rest[:-1] if many else rest[:1])


def _limit(flat_N: Any, share: Any) -> Any:
    """The largest score that is dropped, along the last axis; below all where none is."""
    # A little more than the product, as 0.7 * 10 in float32 may be below 7.
    dropped = jnp.floor(share * flat_N.shape[-1] + 1e-3).astype(jnp.int32)
    limit = jnp.take(jnp.sort(flat_N, axis=-1), jnp.maximum(dropped - 1, 0), axis=-1)
    return jnp.where(dropped > 0, limit, -1.0)


def _mask(path: str, param: Any, pattern: tuple[int, int] | None, keep_zeros: bool) -> Mask:
    boxed = isinstance(param, Boxed)
    value = param.value if boxed else param
    names = param.axes if boxed else (None,) * value.ndim
    stacked, inputs = axes_of(names)
    size = 1
    for axis in inputs:
        size *= value.shape[axis]
    if pattern and size % pattern[1]:
        raise UserError(
            f"{path} has {size} inputs, which {pattern[0]}:{pattern[1]} does not divide: leave it "
            "out by `where`."
        )
    kept = value != 0 if keep_zeros else jnp.ones_like(value, bool)
    kept = kept.astype(jnp.uint8)
    return Mask(Boxed(kept, names) if boxed else kept, stacked, inputs)


def _by_path(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, Boxed))
    return {_name(path): x for path, x in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
