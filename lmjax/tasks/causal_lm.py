"""Next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmjax.core import (
    CARRY,
    Batch,
    Decoder,
    DecoderOutput,
    Mean,
    Output,
    Spec,
    TextDataset,
    Variables,
    Work,
)
from lmjax.errors import UserError, did_you_mean
from lmjax.ops.losses import cross_entropy
from lmjax.tasks.forward import forward


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Cross-entropy of each next token, in nats, over the targets whose weight is not zero.

    Reads `tokens`, `targets` and `weights` of a batch, and `segments`, `positions` (packed
    documents) and `target_bytes` (which adds the metric `bits_per_byte`) where there are any. A
    stateful model wants `continues`: rows where it is 0 begin anew.

    Args:
      model: any `core.Decoder`.
      vocab_chunk: if not 0, logits are made for so many tokens of the vocabulary at a time.
      z_loss: weight of log(Z)^2, which keeps the softmax's normaliser near 1 (PaLM,
        arXiv:2204.02311, section 5). Part of the loss that is descended, not of the one reported.
      aux_losses: weights of the model's auxiliary losses ({"load_balance_loss": 1e-2}), likewise;
        each is summed over layers and, like the loss, over tokens. So totals add over microbatches
        and devices whatever the targets' weights are; where all are one, the loss descended is the
        mean over tokens of nll + weight * (sum over layers), and where some are zero the tokens
        without a target count in the auxiliary losses and not in the divisor. The metric of the
        same name is the mean over tokens and layers.
    """

    loss_unit: ClassVar[str] = "nats"

    model: Decoder
    vocab_chunk: int = 0
    z_loss: float = 0.0
    aux_losses: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vocab_chunk < 0 or self.z_loss < 0:
            raise UserError(
                f"vocab_chunk is {self.vocab_chunk} and z_loss {self.z_loss}: "
                "neither may be negative."
            )

    def check(self, data: TextDataset) -> None:
        """Raises UserError where the data has longer contexts or more tokens than the model."""
        if missing := {"tokens", "targets", "weights"} - set(data.example):
            raise UserError(
                f"the data has no {', '.join(sorted(missing))}, which next tokens need: it has "
                f"{', '.join(data.example)}. Use a data set of text."
            )
        length, vocab_size = data.example["tokens"].shape[0], data.vocab_size
        if length > self.model.max_length:
            raise UserError(
                f"data.length is {length}, and the model's max_length {self.model.max_length}: "
                "lower the first or raise the second."
            )
        if vocab_size > self.model.vocab_size:
            raise UserError(
                f"the tokenizer has {vocab_size} tokens, and the model's vocab_size is "
                f"{self.model.vocab_size}: a token beyond the vocabulary cannot be read. "
                f"Set the model's vocab_size to at least {vocab_size}."
            )
        if getattr(self.model, "stateful", False) and "continues" not in data.example:
            raise UserError(
                "the model is stateful, and rows of this data do not go on where those of the "
                'batch before ended: set data.order="continued", or the model\'s stateful=False.'
            )

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the model's variables."""
        return self.model.init(rng, batch["tokens"])

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """The loss and, where bytes are known, bits per byte."""
        output, model_state, _ = self.read(variables, batch, rng, train=train)
        return self.judged(output, model_state, batch, train=train)

    def read(
        self,
        variables: Variables,
        batch: Batch,
        rng: jax.Array,
        *,
        train: bool,
        layers: Sequence[int] = (),
    ) -> tuple[DecoderOutput, Variables, list[jax.Array]]:
        """What the model makes of a batch, its collections that have changed, and these layers'.

        See `tasks.forward`.
        """
        if train and CARRY in variables:
            variables = {**variables, CARRY: _going_on(variables[CARRY], batch["continues"])}
        return forward(
            self.model,
            variables,
            batch["tokens"],
            positions_BT=batch.get("positions"),
            segments_BT=batch.get("segments"),
            rng=rng,
            train=train,
            layers=layers,
        )

    def judged(
        self, output: DecoderOutput, model_state: Variables, batch: Batch, *, train: bool
    ) -> Output:
        """The loss of what `read` gave."""
        nll_BT, z_BT = cross_entropy(
            output.hidden_BTD,
            output.unembedding,
            batch["targets"],
            vocab_chunk=self.vocab_chunk,
            z_loss=self.z_loss,
        )
        loss = Mean.of(nll_BT, batch["weights"])
        metrics = {"loss": loss, **output.aux}
        if "target_bytes" in batch:
            num_bytes = jnp.sum(batch["target_bytes"] * batch["weights"])
            metrics["bits_per_byte"] = Mean(loss.total / math.log(2), num_bytes)
        if train:
            if self.z_loss:
                loss = Mean.of(nll_BT + z_BT, batch["weights"])
            for name, weight in self.aux_losses.items():
                if name not in output.aux:
                    raise UserError(
                        f"aux_losses names {name!r}, and the model has no such loss."
                        + did_you_mean(name, output.aux)
                    )
                loss = Mean(loss.total + weight * output.aux[name].total, loss.weight)
        return Output(loss=loss, metrics=metrics, model_state=dict(model_state))

    def work(self, example: Spec) -> Work:
        """Three forward passes' worth: one forward, two backward."""
        length = example["tokens"].shape[0]
        causal, full = self.model.flop_per_token(length)
        return Work(
            unit="tokens", units=length, flop=3 * length * causal, flop_full=3 * length * full
        )

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part of the model."""
        return self.model.count_params(params)


def _going_on(carry: Any, continues_B: jax.Array) -> Any:
    """What rows carry, and zeros where they begin anew."""

    def rows(x: jax.Array) -> jax.Array:
        return jnp.where(continues_B.reshape(-1, *[1] * (x.ndim - 1)) > 0, x, 0)

    return jax.tree.map(rows, carry)
