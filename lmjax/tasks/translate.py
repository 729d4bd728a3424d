"""Translation: a target, token by token, of a source."""

# B batch, T target length, M source length

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmjax.core import Batch, EncoderDecoder, Mean, Output, Spec, TextDataset, Variables, Work
from lmjax.errors import UserError
from lmjax.ops.losses import cross_entropy
from lmjax.tasks.forward import forward

NEEDED = ("source", "targets", "weights")


@dataclass(frozen=True, kw_only=True)
class Translate:
    """Cross-entropy of each target token, in nats, given its source and the tokens before it.

    Source: Vaswani et al., arXiv:1706.03762, sections 3.1 and 5.4. The loss that is descended has
    smoothed labels, of which `label_smoothing` is shared by all tokens alike (Szegedy et al.,
    arXiv:1512.00567, section 7); the one that is reported, and evaluated, has not.

    Reads `source`, `targets` and `weights` of a batch, and where there are any `segments`,
    `positions`, `source_segments` and `source_positions` (several pairs to a row). The decoder
    reads the targets one later, with the model's `start_id` before each target's first token.

    Args:
      model: any `core.EncoderDecoder`.
      label_smoothing: the paper has 0.1.
      vocab_chunk: if not 0, logits are made for so many tokens of the vocabulary at a time.
      z_loss: weight of log(Z)^2; see `CausalLM`.
    """

    loss_unit: ClassVar[str] = "nats"

    model: EncoderDecoder
    label_smoothing: float = 0.1
    vocab_chunk: int = 0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"label_smoothing is {self.label_smoothing}: must be at least 0 and below 1."
            )
        if self.vocab_chunk < 0 or self.z_loss < 0:
            raise UserError(
                f"vocab_chunk is {self.vocab_chunk} and z_loss {self.z_loss}: "
                "neither may be negative."
            )
        if not isinstance(self.model, EncoderDecoder):
            raise UserError(
                "the model reads no source: translation needs an encoder-decoder, as "
                "models.transformer or models.t5."
            )

    def check(self, data: TextDataset) -> None:
        """Raises UserError where the data has no pairs, or more tokens than the model knows."""
        if missing := sorted(set(NEEDED) - set(data.example)):
            raise UserError(
                f"the data has no {', '.join(missing)}, which translation needs: it has "
                f"{', '.join(data.example)}. Use lmjax.data.parallel.Parallel."
            )
        for name, what in (("targets", "length"), ("source", "source_length")):
            length = data.example[name].shape[0]
            if length > self.model.max_length:
                raise UserError(
                    f"data.{what} is {length}, and the model's max_length "
                    f"{self.model.max_length}: lower the first or raise the second."
                )
        if data.vocab_size > self.model.vocab_size:
            raise UserError(
                f"the tokenizer has {data.vocab_size} tokens, and the model's vocab_size is "
                f"{self.model.vocab_size}: a token beyond the vocabulary cannot be read. "
                f"Set the model's vocab_size to at least {data.vocab_size}."
            )

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the model's variables."""
        return self.model.init(rng, batch["targets"])

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """The loss, smoothed where it is descended."""
        targets_BT = batch["targets"]
        output, state, _ = forward(
            self.model,
            variables,
            shifted(targets_BT, batch.get("positions"), self.model.start_id),
            source_BM=batch["source"],
            positions_BT=batch.get("positions"),
            segments_BT=batch.get("segments"),
            source_positions_BM=batch.get("source_positions"),
            source_segments_BM=batch.get("source_segments"),
            rng=rng,
            train=train,
        )
        nll_BT, extra_BT = cross_entropy(
            output.hidden_BTD,
            output.unembedding,
            targets_BT,
            vocab_chunk=self.vocab_chunk,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing if train else 0.0,
        )
        loss = Mean.of(nll_BT, batch["weights"])
        metrics = {"loss": loss, **output.aux}
        if train:
            loss = Mean.of(nll_BT + extra_BT, batch["weights"])
        return Output(loss=loss, metrics=metrics, model_state=state)

    def work(self, example: Spec) -> Work:
        """Three forward passes' worth: one forward, two backward; units are tokens of targets.

        A row is counted as one pair as long as it is: packed pairs attend to less.
        """
        length = example["targets"].shape[0]
        causal, full = self.model.flop(example["source"].shape[0], length)
        return Work(unit="tokens", units=length, flop=3 * causal, flop_full=3 * full)

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part of the model."""
        return self.model.count_params(params)


def shifted(targets_BT: jax.Array, positions_BT: jax.Array | None, start_id: int) -> jax.Array:
    """The targets one later, `start_id` before each target's first token."""
    before_BT = jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
    if positions_BT is None:
        return before_BT
    return jnp.where(positions_BT == 0, start_id, before_BT)
