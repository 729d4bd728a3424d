"""Which steps are bad, decided on the devices before their update is applied, and what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from lmjax.errors import UserError

WATCHED = ("loss", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What makes a step bad, and what is done about it.

    A step is bad whose loss or gradient norm is NaN or infinite, or more than a multiple of its
    median over the last good steps. The update of a bad step is never applied: the compiled step
    decides, so that the state before it is still there when the host hears of it.

    Args:
      policy: 'stop' ends the run, 'skip' goes on with the next batch, and 'rollback' goes back to
        the newest good checkpoint and from there on leaves out the offending batch.
      loss_spike: a loss above this multiple of the median is bad; 0 for no such rule.
      norm_spike: likewise of the gradient norm.
      window: how many good steps the median is of; the rules begin when half of them are there.
      limit: after so many bad steps 'skip' and 'rollback' stop the run as well.
    """

    policy: Literal["stop", "skip", "rollback"] = "stop"
    loss_spike: float = 0.0
    norm_spike: float = 0.0
    window: int = 64
    limit: int = 10

    def __post_init__(self) -> None:
        for name in ("loss_spike", "norm_spike"):
            value = getattr(self, name)
            if value and not 1 < value < math.inf:
                raise UserError(f"{name} is {value}: give a multiple above 1, or 0 for no rule.")
        for name, most in (("window", 10_000), ("limit", 10**9)):
            if not 1 <= (value := getattr(self, name)) <= most:
                raise UserError(f"{name} is {value}: must be from 1 to {most}.")

    @property
    def spikes(self) -> tuple[float, float]:
        """The multiples for `WATCHED`; infinity where there is no rule."""
        return self.loss_spike or math.inf, self.norm_spike or math.inf

    def start(self) -> dict[str, jax.Array]:
        """What the guard remembers from step to step, as part of the training state."""
        recent = jnp.full((self.window, len(WATCHED)), jnp.nan)
        return {"halted": jnp.zeros((), bool), "recent": recent}

    def judge(
        self, memory: Mapping[str, jax.Array], loss: jax.Array, norm: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """(whether the update is applied, whether the step is bad, the new memory).

        After a bad step no update is applied, unless the policy is to skip it, until the host has
        dealt with it.
        """
        now = jnp.stack([loss, norm]).astype(jnp.float32)
        bad = ~jnp.all(jnp.isfinite(now))
        recent = memory["recent"]
        if self.loss_spike or self.norm_spike:
            known = jnp.sum(~jnp.isnan(recent[:, 0]))
            limits = jnp.nanmedian(recent, axis=0) * jnp.asarray(self.spikes)
            bad |= (2 * known >= self.window) & jnp.any(now > limits)
        applied = ~bad & ~memory["halted"]
        halted = memory["halted"] | (bad & (self.policy != "skip"))
        rolled = jnp.where(applied, jnp.concatenate([recent[1:], now[None]]), recent)
        return applied, bad, {"halted": halted, "recent": rolled}

    def reason(self, values: Mapping[str, float], medians: Mapping[str, float]) -> str:
        """Why a step is bad, from its metrics and the medians of the good steps before it."""
        found = []
        for name, multiple in zip(WATCHED, self.spikes, strict=True):
            what, value = name.replace("grad_norm", "gradient norm"), values[name]
            if not math.isfinite(value):
                found.append(f"the {what} is {value}")
            elif value > multiple * medians.get(name, math.inf):
                times = value / medians[name]
                found.append(f"the {what} is {value:.4g}, {times:.3g} times its median of late")
        return " and ".join(found) or "the loss or the gradient norm is far above its median"
