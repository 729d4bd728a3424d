"""Prediction of masked tokens."""

# B batch, T length, D embed, V vocabulary.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmjax.core import Batch, Dataset, Encoder, Mean, Output, Spec, Unembedding, Variables, Work
from lmjax.errors import UserError, did_you_mean
from lmjax.ops.losses import cross_entropy, logits
from lmjax.tasks.forward import forward


@dataclass(frozen=True, kw_only=True)
class MaskedLM:
    """Cross-entropy of each token that is to be predicted, in nats.

    Source: Devlin et al. (BERT), arXiv:1810.04805, section 3.1, task 1. What is masked the data
    says (`lmjax.data.masked`): `tokens`, `targets`, `weights`, `segments` and `positions`. Without
    training the metric `accuracy` is the share of these tokens that the model finds likeliest.

    Args:
      model: any `core.Encoder` with a head that predicts tokens.
      vocab_chunk: if not 0, logits are made for so many tokens of the vocabulary at a time.
      aux_losses: weights of the model's auxiliary losses, as in `CausalLM`.
    """

    loss_unit: ClassVar[str] = "nats"

    model: Encoder
    vocab_chunk: int = 0
    aux_losses: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vocab_chunk < 0:
            raise UserError(f"vocab_chunk is {self.vocab_chunk}: must not be negative.")

    def check(self, data: Dataset) -> None:
        """Raises UserError where nothing is masked, and where the model cannot read the data."""
        if not hasattr(data, "masked_fraction"):
            raise UserError(
                f"nothing is masked in {type(data).__name__}: wrap it, as "
                "lmjax.data.masked.Masked(of=...)."
            )
        length, vocab_size = data.example["tokens"].shape[0], getattr(data, "vocab_size", 0)
        if length > self.model.max_length:
            raise UserError(
                f"data.length is {length}, and the model's max_length {self.model.max_length}: "
                "lower the first or raise the second."
            )
        if vocab_size > self.model.vocab_size:
            raise UserError(
                f"the tokenizer with its mask has {vocab_size} tokens, and the model's vocab_size "
                f"is {self.model.vocab_size}: set it to at least {vocab_size}."
            )

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the model's variables."""
        return self.model.init(rng, batch["tokens"])

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """The loss, and without training the accuracy."""
        output, state, _ = forward(
            self.model,
            variables,
            batch["tokens"],
            positions_BT=batch.get("positions"),
            segments_BT=batch.get("segments"),
            rng=rng,
            train=train,
        )
        hidden_BTD, unembedding = output.predicting_BTD, output.unembedding
        if hidden_BTD is None or unembedding is None:
            raise UserError(
                "the model has no head that predicts tokens: set its token_head to True."
            )
        targets_BT, weights_BT = batch["targets"], batch["weights"]
        nll_BT, _ = cross_entropy(hidden_BTD, unembedding, targets_BT, vocab_chunk=self.vocab_chunk)
        loss = Mean.of(nll_BT, weights_BT)
        metrics = {"loss": loss, **output.aux}
        if train:
            for name, weight in self.aux_losses.items():
                if name not in output.aux:
                    raise UserError(
                        f"aux_losses names {name!r}, and the model has no such loss."
                        + did_you_mean(name, output.aux)
                    )
                loss = Mean(loss.total + weight * output.aux[name].total, loss.weight)
        else:
            best_BT = likeliest(hidden_BTD, unembedding, vocab_chunk=self.vocab_chunk)
            metrics["accuracy"] = Mean.of((best_BT == targets_BT).astype(jnp.float32), weights_BT)
        return Output(loss=loss, metrics=metrics, model_state=state)

    def work(self, example: Spec) -> Work:
        """Three forward passes' worth: one forward, two backward."""
        length = example["tokens"].shape[0]
        flop = 3 * length * self.model.flop_per_token(length)[1]
        return Work(unit="tokens", units=length, flop=flop, flop_full=flop)

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part of the model."""
        return self.model.count_params(params)


def likeliest(
    hidden_BTD: jax.Array, unembedding: Unembedding, *, vocab_chunk: int = 0
) -> jax.Array:
    """The token with the highest logit, [B, T]; about `vocab_chunk` logits a token are held."""
    size = unembedding.vocab_size
    best_BT = jnp.full(hidden_BTD.shape[:2], -jnp.inf)
    token_BT = jnp.zeros(hidden_BTD.shape[:2], jnp.int32)
    for start in range(0, size, vocab_chunk or size):
        end = min(start + (vocab_chunk or size), size)
        bias_V = unembedding.bias_V
        part = replace(
            unembedding,
            weights_VD=unembedding.weights_VD[start:end],
            bias_V=None if bias_V is None else bias_V[start:end],
            vocab_size=end - start,
        )
        logits_BTC = logits(hidden_BTD, part)
        top_BT = jnp.max(logits_BTC, axis=-1)
        found_BT = jnp.argmax(logits_BTC, axis=-1).astype(jnp.int32) + start
        token_BT = jnp.where(top_BT > best_BT, found_BT, token_BT)
        best_BT = jnp.maximum(top_BT, best_BT)
    return token_BT
