"""The mean of a run's last checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lmjax.engine.checkpoint import Checkpoints
from lmjax.errors import UserError


def averaged_checkpoints(
    checkpoints: Checkpoints, step: int | None, count: int
) -> tuple[int, dict[str, Any], Mapping[str, Any]]:
    """(step, variables, about) of the newest checkpoint, or that of `step`.

    With `count` above 1 the parameters are the mean of so many checkpoints, that one the newest,
    summed in float64 and kept in the dtype that they were saved in. Mutable state is the newest's.

    Source: Vaswani et al., arXiv:1706.03762, section 6.1 (the last 5, written every 10 minutes).

    Raises UserError where there are fewer, or one cannot be read.
    """
    if count < 1:
        raise UserError(f"average is {count}: give 1 for one checkpoint alone, or more.")
    newest, variables, about = checkpoints.restore_for_inference(step)
    if count == 1:
        return newest, variables, about
    steps = [s for s in checkpoints.steps() if s <= newest][-count:]
    if len(steps) < count:
        raise UserError(
            f"{checkpoints.directory} holds {len(steps)} checkpoints up to step {newest}, and the "
            f"mean of {count} is asked for. Average fewer, or train with keep_last={count}."
        )
    params = variables["params"]
    total = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for one in steps[:-1]:
        more = checkpoints.restore_for_inference(one)[1]["params"]
        total = jax.tree.map(lambda t, x: t + np.asarray(x, np.float64), total, more)
    mean = jax.tree.map(lambda t, x: (t / count).astype(x.dtype), total, params)
    return newest, {**variables, "params": mean}, about
