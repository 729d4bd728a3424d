"""Regression: one number or several of each row."""

# B batch, C values.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lmjax.core import Batch, Dataset, Mean, Network, Output, Spec, Variables, Work
from lmjax.errors import UserError, did_you_mean
from lmjax.ops.penalty import KERNELS, check_penalty, penalised_mean
from lmjax.tasks.forward import forward

Loss = Literal["mse", "mae", "huber"]


@dataclass(frozen=True, kw_only=True)
class Regress:
    """The error of each row's values, over the rows whose weight is not zero.

    Reads `values` and `weights` of a batch; the model reads the rest. Of several values a row's
    error is their mean. With the error e of one: "mse" is e^2, "mae" |e|, and "huber" with d
    e^2 / 2 below d and d (|e| - d / 2) from there on (Huber, "Robust Estimation of a Location
    Parameter", 1964). What is reported as loss has no penalties; the metrics `mse` and `mae` stand
    beside it. All is in the units in which the data scales its values.

    Args:
      model: any `core.Network`, with an output for each value.
      error: which of them is descended.
      delta: d of "huber".
      l1: weight of sum |w|, see `ops.penalty.penalised_mean`, also for what scikit-learn calls it.
      l2: weight of sum w^2, likewise.
      penalised: regex over parameter paths; those in which it is found are penalised.
    """

    model: Network
    error: Loss = "mse"
    delta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    penalised: str = KERNELS

    def __post_init__(self) -> None:
        if self.error not in get_args(Loss):
            given = str(self.error)
            raise UserError(f"error is {given!r}." + did_you_mean(given, get_args(Loss)))
        if not (self.delta > 0 and math.isfinite(self.delta)):
            raise UserError(f"delta is {self.delta}: must be above 0, and finite.")
        check_penalty(l1=self.l1, l2=self.l2, penalised=self.penalised)

    def check(self, data: Dataset) -> None:
        """Raises UserError where the data has no values, or another number than the outputs."""
        if "values" not in data.example:
            raise UserError(
                f"{type(data).__name__} has no values to regress, but "
                f"{', '.join(data.example)}: of a table, set kind='values'."
            )
        wanted = math.prod(data.example["values"].shape)
        if self.model.num_outputs != wanted:
            raise UserError(
                f"the model has {self.model.num_outputs} outputs, and the data {wanted} values: "
                f"set the model's num_outputs to {wanted}."
            )
        self.model.check(data)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the model's variables."""
        return self.model.init(rng, batch)

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """The error, and the mean squared and absolute ones."""
        output, state, _ = forward(self.model, variables, batch, rng=rng, train=train)
        error_BC = output.values_BC - _columns(batch["values"])
        metrics = {
            name: Mean.of(jnp.mean(of(error_BC), axis=-1), batch["weights"])
            for name, of in (("loss", self._error), ("mse", jnp.square), ("mae", jnp.abs))
        }
        loss = metrics["loss"]
        if train:
            loss = penalised_mean(
                loss, variables["params"], l1=self.l1, l2=self.l2, penalised=self.penalised
            )
        return Output(loss=loss, metrics={**metrics, **output.aux}, model_state=state)

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """scores_BC, what the model says, and the batch's values and weights, if it has them."""
        output, *_ = forward(self.model, variables, batch, train=False)
        found = {"scores_BC": output.values_BC}
        if "values" in batch:
            found["values_BC"] = _columns(batch["values"])
        if "weights" in batch:
            found["weights_B"] = batch["weights"]
        return found

    def work(self, example: Spec) -> Work:
        """Three forward passes' worth: one forward, two backward."""
        flop = 3 * self.model.flop(example)
        return Work(unit="examples", units=1, flop=flop, flop_full=flop)

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part of the model."""
        return self.model.count_params(params)

    def _error(self, error_BC: jax.Array) -> jax.Array:
        if self.error == "mse":
            return jnp.square(error_BC)
        size_BC = jnp.abs(error_BC)
        if self.error == "mae":
            return size_BC
        inner_BC = jnp.minimum(size_BC, self.delta)
        return inner_BC * (size_BC - 0.5 * inner_BC)


def _columns(values: jax.Array) -> jax.Array:
    """[B] or [B, C] as [B, C], float32."""
    values = values.astype(jnp.float32)
    return values[:, None] if values.ndim == 1 else values
