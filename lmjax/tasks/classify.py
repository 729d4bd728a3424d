"""Classification: one class a row, or several that hold or not."""

# B batch, C classes.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.core import (
    Batch,
    Dataset,
    LabelledDataset,
    Mean,
    Network,
    Output,
    Spec,
    Variables,
    Work,
)
from lmjax.errors import UserError, did_you_mean
from lmjax.ops.classification import sigmoid_cross_entropy, softmax_cross_entropy
from lmjax.ops.penalty import KERNELS, check_penalty, penalised_mean
from lmjax.tasks.forward import forward

MOST_NAMED = 20  # of more classes the recall of each is no metric


def classes(of: LabelledDataset) -> tuple[str, ...]:
    """The names of the data's labels, for a task's configuration."""
    return of.classes


def num_classes(of: LabelledDataset) -> int:
    """How many labels the data has, for a model's configuration."""
    return len(of.classes)


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Cross-entropy of each row's label, in nats, over the rows whose weight is not zero.

    Reads `labels` and `weights` of a batch; the model reads the rest. The loss that is reported is
    of the labels as they are: class weights and smoothing are in the one that is descended.

    Args:
      model: any `core.Network`. Its outputs are the classes' scores; a single one, with "sigmoid",
        is the score of the second of two classes.
      activation: "softmax": one class a row, labels int32 []. "sigmoid": each class for itself,
        labels float32 [C] of zeros and ones, of which the loss is the mean; or two classes, labels
        int32 [], and one output.
      classes: their names, those of the data (`classes(of=data)`), where `class_weights` are given
        or the recall of each class is wanted as a metric.
      class_weights: by the class's name, 1 where not given. A row counts as much as its label's
        weight, and the mean divides by their sum. Where several classes may hold, the weight
        multiplies what a class that holds costs, and nothing else.
      label_smoothing: see `ops.classification`.
      l1, l2, penalised: see `ops.penalty.penalised_mean`; in the loss that is descended.
      aux_losses: weights of the model's auxiliary losses, by their names.
    """

    loss_unit: ClassVar[str] = "nats"

    model: Network
    activation: Literal["softmax", "sigmoid"] = "softmax"
    classes: Sequence[str] = ()
    class_weights: Mapping[str, float] = field(default_factory=dict)
    label_smoothing: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    penalised: str = KERNELS
    aux_losses: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.activation not in ("softmax", "sigmoid"):
            given = str(self.activation)
            raise UserError(
                f"activation is {given!r}." + did_you_mean(given, ("softmax", "sigmoid"))
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"label_smoothing is {self.label_smoothing}: must be at least 0 and below 1."
            )
        for name, weight in self.class_weights.items():
            if self.classes and name not in self.classes:
                hint = did_you_mean(name, self.classes)
                raise UserError(f"class_weights names {name!r}, which is no class.{hint}")
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"class_weights: {name!r} has {weight}: must be above 0.")
        if self.class_weights and not self.classes:
            raise UserError("class_weights need classes, the names in their order: give both.")
        check_penalty(l1=self.l1, l2=self.l2, penalised=self.penalised)

    def check(self, data: Dataset) -> None:
        """Raises UserError where the data's labels are not what the model's outputs are for."""
        if not hasattr(data, "classes") or "labels" not in data.example:
            raise UserError(
                f"{type(data).__name__} has no labels, and this task learns to give them: use "
                "labelled data (lmjax.data.labelled_text, ...)."
            )
        names, labels = tuple(data.classes), data.example["labels"]
        several = len(labels.shape) == 1
        outputs = self.model.num_outputs
        if len(names) < 2:
            raise UserError(f"the data has the classes {list(names)}: give at least two.")
        if self.classes and tuple(self.classes) != names:
            raise UserError(
                f"classes is {list(self.classes)}, and the data's are {list(names)}: give "
                "classes(of=data), or the data's own in their order."
            )
        if several and self.activation == "softmax":
            raise UserError(
                "of this data's classes several may hold for a row, and activation='softmax' "
                "chooses one: set activation='sigmoid'."
            )
        single = self.activation == "sigmoid" and not several
        wanted = 1 if single else len(names)
        if single and len(names) != 2:
            raise UserError(
                f"activation='sigmoid' with one label a row is for two classes, and the data has "
                f"{len(names)}: set activation='softmax'."
            )
        if outputs != wanted:
            raise UserError(
                f"the model has {outputs} outputs, and {self.activation} of these {len(names)} "
                f"classes needs {wanted}: set the model's num_outputs."
            )
        self.model.check(data)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the model's variables."""
        return self.model.init(rng, batch)

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """The loss and the accuracy, where several classes may hold that of each of them."""
        output, state, _ = forward(self.model, variables, batch, rng=rng, train=train)
        values_BC, labels, weights_B = output.values_BC, batch["labels"], batch["weights"]
        several = labels.ndim == 2
        loss = self._mean(values_BC, labels, weights_B, plain=True)
        scores_BC = _scores(values_BC, self.activation)
        if several:
            right_B = jnp.mean(((values_BC > 0) == (labels > 0.5)).astype(jnp.float32), axis=-1)
        else:
            right_B = (jnp.argmax(scores_BC, axis=-1) == labels).astype(jnp.float32)
        metrics = {"loss": loss, "accuracy": Mean.of(right_B, weights_B), **output.aux}
        if not several and not train and len(self.classes) <= MOST_NAMED:
            for i, name in enumerate(self.classes):
                metrics[f"recall/{name}"] = Mean.of(right_B, weights_B * (labels == i))
        if train:
            loss = self._mean(values_BC, labels, weights_B, plain=False)
            for name, weight in self.aux_losses.items():
                if name not in output.aux:
                    raise UserError(
                        f"aux_losses names {name!r}, and the model has no such loss."
                        + did_you_mean(name, output.aux)
                    )
                loss = Mean(loss.total + weight * output.aux[name].total, loss.weight)
            loss = penalised_mean(
                loss, variables["params"], l1=self.l1, l2=self.l2, penalised=self.penalised
            )
        return Output(loss=loss, metrics=metrics, model_state=state)

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Probabilities, scores_BC, and the batch's weights and labels as far as it has them.

        Two classes have two of them, though the model may have one output.
        """
        output, *_ = forward(self.model, variables, batch, train=False)
        found = {"scores_BC": _scores(output.values_BC, self.activation)}
        for name in ("labels", "weights"):
            if name in batch:
                found[f"{name}_B" if batch[name].ndim == 1 else f"{name}_BC"] = batch[name]
        return found

    def work(self, example: Spec) -> Work:
        """Three forward passes' worth: one forward, two backward."""
        flop = 3 * self.model.flop(example)
        return Work(unit="examples", units=1, flop=flop, flop_full=flop)

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part of the model."""
        return self.model.count_params(params)

    def _mean(
        self, values_BC: jax.Array, labels: jax.Array, weights_B: jax.Array, *, plain: bool
    ) -> Mean:
        """The mean loss; `plain` of the labels as they are, else as this task weighs them."""
        given = self.class_weights and not plain
        weights = np.array([self.class_weights.get(c, 1.0) for c in self.classes], np.float32)
        weights_C = jnp.asarray(weights) if given else None
        smoothing = 0.0 if plain else self.label_smoothing
        if self.activation == "softmax":
            loss_B = softmax_cross_entropy(
                values_BC, labels, weights_C=weights_C, smoothing=smoothing
            )
            counts_B = weights_B if weights_C is None else weights_B * weights_C[labels]
            return Mean(jnp.sum(loss_B * weights_B), jnp.sum(counts_B))
        if labels.ndim == 2:
            loss_BC = sigmoid_cross_entropy(
                values_BC, labels, weights_C=weights_C, smoothing=smoothing
            )
            return Mean.of(jnp.mean(loss_BC, axis=-1), weights_B)
        loss_B1 = sigmoid_cross_entropy(values_BC, labels[:, None], smoothing=smoothing)
        return Mean.of(
            loss_B1[:, 0], weights_B if weights_C is None else weights_B * weights_C[labels]
        )


def _scores(values_BC: jax.Array, activation: str) -> jax.Array:
    """Probabilities of the classes, which of one output are two."""
    if activation == "softmax":
        return jax.nn.softmax(values_BC, axis=-1)
    yes_BC = jax.nn.sigmoid(values_BC)
    return yes_BC if yes_BC.shape[-1] > 1 else jnp.concatenate([1 - yes_BC, yes_BC], axis=-1)
