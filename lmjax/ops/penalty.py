"""What large weights cost: the L1 and L2 penalties of a task's objective."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.core import Mean
from lmjax.errors import UserError, check_regex

KERNELS = r"(kernel|table)$"  # matrices and embeddings: no bias, no scale


def check_penalty(*, l1: float, l2: float, penalised: str) -> None:
    """Raises UserError for weights of penalties below 0, and for what is no regular expression."""
    for name, weight in (("l1", l1), ("l2", l2)):
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"{name} is {weight}: must be at least 0, and finite.")
    check_regex("penalised", penalised)


def penalised_mean(loss: Mean, params: Any, *, l1: float, l2: float, penalised: str) -> Mean:
    """`loss` whose mean is greater by l1 * sum |w| + l2 * sum w^2.

    The sums go over the parameters in whose path the regex `penalised` is found. What is added to
    the total is the penalty times the weight, so that microbatches add to the same mean.

    With n rows and the mean over them, the objectives of scikit-learn are these, but for a factor
    on the whole:
      Ridge(alpha), squared error: l2 = alpha / n
      Lasso(alpha), squared error: l1 = 2 alpha
      ElasticNet(alpha, l1_ratio=r), squared error: l1 = 2 alpha r, l2 = alpha (1 - r)
      LogisticRegression(C), two classes and one output: l2 = 1 / (2 C n)
      LogisticRegression(C), two classes and two outputs: l2 = 1 / (C n)
      LogisticRegression(C), more classes, an output each: l2 = 1 / (2 C n)
      LogisticRegression(C, l1_ratio=1), one output: l1 = 1 / (C n)

    Raises UserError where the regex is found in no path.
    """
    if not l1 and not l2:
        return loss
    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_path = {jax.tree_util.keystr(p, simple=True, separator="/"): w for p, w in leaves}
    chosen = [w for path, w in by_path.items() if re.search(penalised, path)]
    if not chosen:
        some = ", ".join(list(by_path)[:8])
        raise UserError(f"penalised={penalised!r} matches no parameter. There are: {some}, ...")
    penalty = jnp.zeros(())
    for w in chosen:
        w = w.astype(jnp.float32)
        size = w * jax.lax.stop_gradient(jnp.sign(w))  # the slope of jnp.abs at 0 is 1, not 0
        penalty += l1 * jnp.sum(size) + l2 * jnp.sum(jnp.square(w))
    return Mean(loss.total + penalty * loss.weight, loss.weight)
