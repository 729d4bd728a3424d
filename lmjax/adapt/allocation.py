"""Which ranks of `AdaLora` are worth keeping: a transformation around an optimizer.

Its state lies in that of the optimizer, split as the parameters are, so that checkpoints, layouts
and rollbacks know it.
"""

# N triplets (a rank of a matrix each) of all matrices together, r rank

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.errors import UserError, did_you_mean
from lmjax.sharding import Boxed

Form = Literal["paper", "peft"]
Flat = dict[str, Any]


class AllocationState(NamedTuple):
    """Updates made, averages of sensitivity and its uncertainty, ranks left, and the optimizer's.

    `ranks` are of all matrices together.
    """

    step: jax.Array
    sensitivity: Flat
    uncertainty: Flat
    ranks: jax.Array
    optimizer: Any


def adalora(
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    target_rank: int = 8,
    warmup_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    b1: float = 0.85,
    b2: float = 0.85,
    orthogonality: float = 0.5,
    form: Form = "paper",
    name: str = "adalora",
) -> optax.GradientTransformation:
    """The optimizer, with AdaLoRA's penalty in its gradients and its pruning of values after it.

    Source: Zhang et al., arXiv:2303.10512: sensitivity |w dL/dw| and its averages, equations 9 to
    11; importance of a triplet, equation 8; the budget falls from the ranks at the start to
    `target_rank` a matrix with the cube of the steps left, section 3.3; orthogonality, equation 4.
    At each allocation the values of all triplets that are not among the most important are set to
    zero; they may grow again until the next one. In the last `final_steps` the ranks stay.

    The forms differ in two places. 'paper': sensitivity is that of the parameters that the gradient
    was taken at, and the penalty the sum over matrices of squared Frobenius norms. 'peft' (0.21):
    that of the updated parameters with the gradient from before, and the penalty the mean over all
    A and B of the norms.

    The penalty is no part of the loss that is reported.

    Args:
      optimizer: what updates the parameters; may not average them.
      steps: of the run.
      target_rank: the mean rank of a matrix at the end.
      warmup_steps: for so long no value is pruned.
      final_steps: of the run, in which the choice of ranks is final.
      every: steps between allocations.
      b1: decay of the average of the sensitivity.
      b2: decay of that of its uncertainty.
      orthogonality: weight of the penalty.
      form: see above.
      name: that of the adapter.

    Raises:
      UserError: for numbers that make no schedule; at the first step where no parameter that trains
        is an AdaLora's, where the target is above its rank, and where the optimizer averages.
    """
    if not 0 <= warmup_steps < steps - final_steps or final_steps < 0:
        raise UserError(
            f"steps is {steps}, warmup_steps {warmup_steps} and final_steps {final_steps}: the two "
            "together must leave steps in which ranks are pruned."
        )
    for what, value in (("every", every), ("target_rank", target_rank)):
        if value < 1:
            raise UserError(f"{what} is {value}: must be at least 1.")
    for what, decay in (("b1", b1), ("b2", b2)):
        if not 0 < decay < 1:
            raise UserError(f"{what} is {decay}: must be above 0 and below 1.")
    if not 0 <= orthogonality < math.inf:
        raise UserError(f"orthogonality is {orthogonality}: must be at least 0, and finite.")
    if form not in ("paper", "peft"):
        raise UserError(f"form is {form!r}." + did_you_mean(str(form), ("paper", "peft")))
    schedule = (steps, warmup_steps, final_steps, every)

    def init(params: Any) -> AllocationState:
        own = _own(params, name)
        if not any(path.endswith("values") for path in own):
            raise UserError(
                f"adalora: no parameter that trains is one of an adapter called {name!r}: give the "
                "model an AdaLora, and name it in trainable."
            )
        total, matrices = _counts(own)
        if target_rank * matrices > total:
            raise UserError(
                f"adalora: target_rank is {target_rank}, and the adapter has a rank of "
                f"{total // matrices}: it starts above the target."
            )
        inner = optimizer.init(params)
        if optax.tree_utils.tree_get_all_with_path(inner, "averaged_params"):
            raise UserError(
                "adalora: the optimizer averages the parameters, and the average of a pruned value "
                "is not zero: set its average to None."
            )
        ranks = jnp.asarray(total, jnp.int32)
        mean, spread = (jax.tree.map(jnp.zeros_like, own) for _ in range(2))
        return AllocationState(jnp.zeros((), jnp.int32), mean, spread, ranks, inner)

    def update(
        gradient: Any, state: AllocationState, params: Any = None
    ) -> tuple[Any, AllocationState]:
        own = _own(params, name)
        if orthogonality:
            penalty = functools.partial(_penalty, form=form)
            more = jax.grad(lambda own: orthogonality * penalty(own))(own)
            gradient = _mapped(gradient, lambda path, g: g + more[path] if path in more else g)
        updates, inner = optimizer.update(gradient, state.optimizer, params)
        slope, change = _own(gradient, name), _own(updates, name)
        at = {k: own[k] + change[k] for k in own} if form == "peft" else own
        step = state.step + 1
        learns = step < steps - final_steps
        now = {k: jnp.abs(at[k] * slope[k]) for k in own}
        mean = {k: b1 * state.sensitivity[k] + (1 - b1) * now[k] for k in own}
        spread = {k: b2 * state.uncertainty[k] + (1 - b2) * jnp.abs(now[k] - mean[k]) for k in own}
        mean, spread = jax.tree.map(
            lambda new, old: jnp.where(learns, new, old),
            (mean, spread),
            (dict(state.sensitivity), dict(state.uncertainty)),
        )
        score = _importance({k: mean[k] * spread[k] for k in own})
        total, matrices = _counts(own)
        budget, allocates = _budget(step, total, target_rank * matrices, schedule)
        flat_N = jnp.concatenate([x.ravel() for x in score.values()])
        falls = total - budget  # so many are to go
        threshold = jnp.where(falls > 0, jnp.sort(flat_N)[jnp.maximum(falls - 1, 0)], -jnp.inf)
        kept = {k: jnp.where(allocates, x > threshold, True) for k, x in score.items()}
        new = {k: own[k] + change[k] for k in kept}
        # After the last allocation what was pruned stays so: its scores no longer change.
        pruned = {k: jnp.where(kept[k], change[k], -own[k]) for k in kept}
        ranks = sum(jnp.sum((kept[k] & (new[k] != 0)).astype(jnp.int32)) for k in kept)
        updates = _mapped(updates, lambda path, u: pruned.get(path, u))
        return updates, AllocationState(step, mean, spread, jnp.asarray(ranks), inner)

    return optax.GradientTransformation(init, update)


def _budget(
    step: jax.Array, total: int, target: int, schedule: tuple[int, int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """(how many triplets are kept, whether this step allocates); steps count from 1."""
    steps, warmup, final, every = schedule
    last = steps - final
    # Whole numbers, from a table: a power in float32 would be off by one now and then.
    at = np.arange(warmup // every + 1, last // every + 1) * every
    left = 1 - (at - warmup) / (last - warmup)
    table = jnp.asarray([*((total - target) * left**3 + target).astype(np.int32), target])
    within = (step > warmup) & (step < last) & (step % every == 0)
    index = jnp.clip(step // every - (warmup // every + 1), 0, len(table) - 1)
    budget = jnp.where(step >= last, target, table[index])
    return budget, within | (step >= last)


def _importance(score: Flat) -> Flat:
    """Of each triplet: its value's score and the mean scores of its vectors; [..., r] by path."""
    found = {}
    for path in sorted(k for k in score if k.endswith("values")):
        values, a, b = (score[path.removesuffix("values") + k] for k in ("values", "a", "b"))
        lead = values.ndim - 1
        inner_a = tuple(range(lead, a.ndim - 1))
        inner_b = tuple(range(lead + 1, b.ndim))
        found[path] = values + jnp.mean(a, axis=inner_a) + jnp.mean(b, axis=inner_b)
    return found


def _penalty(own: Flat, *, form: Form) -> jax.Array:
    """How far the vectors of each A and B are from orthonormal."""
    squares = []
    for path in (k for k in own if k.endswith("values")):
        values, a, b = (own[path.removesuffix("values") + k] for k in ("values", "a", "b"))
        lead, r = values.shape[:-1], values.shape[-1]
        for rows in (
            jnp.swapaxes(a.reshape(*lead, -1, r), -1, -2),
            b.reshape(*lead, r, -1),
        ):
            apart = rows @ jnp.swapaxes(rows, -1, -2) - jnp.eye(r).reshape(
                (1,) * len(lead) + (r, r)
            )
            squares.append(jnp.sum(jnp.square(apart), axis=(-1, -2)).ravel())
    all_N = jnp.concatenate(squares)
    if form == "paper":
        return jnp.sum(all_N)
    tiny = float(np.finfo(np.float32).tiny)  # the norm has no gradient at 0
    return jnp.mean(jnp.sqrt(jnp.maximum(all_N, tiny)))


def _counts(own: Mapping[str, Any]) -> tuple[int, int]:
    """(triplets in all, matrices)."""
    shapes = [_value(x).shape for path, x in own.items() if path.endswith("values")]
    return sum(math.prod(s) for s in shapes), sum(math.prod(s[:-1]) for s in shapes)


def _own(params: Any, name: str) -> Flat:
    """The adapter's parameters by path."""
    found: Flat = {}
    inside = re.compile(rf"(^|/){re.escape(name)}/[^/]*$")

    def keep(path: str, x: Any) -> Any:
        if inside.search(path):
            found[path] = x
        return x

    _mapped(params, keep)
    return found


def _mapped(tree: Any, function: Callable[[str, Any], Any]) -> Any:
    """The tree with function(path, leaf) for each leaf; a box is one."""

    def of(path: Any, x: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), x)

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda x: isinstance(x, Boxed))


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Boxed) else x
