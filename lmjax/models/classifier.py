"""A model of text with a layer of scores on it: a classifier, or a regression.

Sources: pooler and head as in Devlin et al. (BERT), arXiv:1810.04805, section 4.1; the mean as in
Reimers & Gurevych (Sentence-BERT), arXiv:1908.10084, section 3; the last token as in Radford et
al., "Improving Language Understanding by Generative Pre-Training" (GPT), section 3.2.

The branch `encoder` has the parameters of the model it was, so that they are loaded by
`WarmStart(path=..., rename=(("^encoder/", ""),), strict=False)`: only `scores` are new.

| parameter | initialisation |
|---|---|
| scores' kernel | normal, std 0.02 |
| scores' bias | 0 |
"""

# B batch, T length, D embed, C outputs.

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.core import Batch, Dataset, NetworkOutput, Spec
from lmjax.errors import UserError, did_you_mean
from lmjax.layers.dropout import Dropout
from lmjax.layers.linear import Linear

Pooling = Literal["pooler", "mean", "last"]
_POOLINGS = ("pooler", "mean", "last")


class Classifier(nn.Module):
    """Scores of each row from one vector of its hidden states; a `core.Network`.

    It reads `tokens`, and `segments` (0 where a row is padded) and `positions` where there are any.
    """

    encoder: Any
    scores: Linear
    num_outputs: int
    pooling: Pooling = "mean"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> NetworkOutput:
        """Shapes: tokens [B, T] -> values_BC, float32."""
        tokens_BT, segments_BT = batch["tokens"], batch.get("segments")
        output = self.encoder(
            tokens_BT, positions_BT=batch.get("positions"), segments_BT=segments_BT, train=train
        )
        if self.pooling == "pooler":
            x_BD = getattr(output, "pooled_BD", None)
            if x_BD is None:
                raise UserError(
                    "pooling='pooler', and the model has no pooler: give it one (pooler=True), or "
                    "set pooling='mean' or 'last'."
                )
        else:
            real_BT = jnp.ones(tokens_BT.shape, bool) if segments_BT is None else segments_BT > 0
            share_BT = _shares(real_BT, self.pooling)
            x_BD = jnp.einsum("BTD,BT->BD", output.hidden_BTD.astype(jnp.float32), share_BT)
        x_BD = Dropout(self.dropout)(x_BD, train=train)
        return NetworkOutput(self.scores(x_BD).astype(jnp.float32), aux=output.aux)

    def check(self, data: Dataset) -> None:
        """Raises UserError where the data has no text, longer rows or more tokens than the model.

        Of the model it is known, by its `vocab_size` and `max_length`, how much it reads.
        """
        if "tokens" not in data.example:
            raise UserError(
                f"the model reads text, and {type(data).__name__} has none: its examples have "
                f"{', '.join(data.example)}."
            )
        length, vocab_size = data.example["tokens"].shape[0], getattr(data, "vocab_size", 0)
        if length > self.encoder.max_length:
            raise UserError(
                f"data.length is {length}, and the model's max_length {self.encoder.max_length}: "
                "lower the first or raise the second."
            )
        if vocab_size > self.encoder.vocab_size:
            raise UserError(
                f"the tokenizer has {vocab_size} tokens, and the model's vocab_size is "
                f"{self.encoder.vocab_size}: set it to at least {vocab_size}."
            )

    def flop(self, example: Spec) -> float:
        """FLOP of the forward pass of one example, without the logits that nobody reads."""
        length = example["tokens"].shape[0]
        per_token = self.encoder.flop_per_token(length)[0]
        dim = self.encoder.embed.dim
        if hasattr(self.encoder, "init_cache"):
            per_token -= 2.0 * dim * self.encoder.vocab_size
        return length * per_token + 2.0 * dim * self.num_outputs

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the vocabulary are left out."""
        scores = sum(x.size for x in jax.tree.leaves(params["scores"]))
        return {**self.encoder.count_params(params["encoder"]), "scores": scores}


def classifier(
    *,
    encoder: Any,
    num_outputs: int,
    pooling: Pooling = "mean",
    dropout: float = 0.1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Classifier:
    """Scores on any `core.Encoder` or `core.Decoder` that has an `embed` of width `dim`.

    Args:
      encoder: the model of text.
      num_outputs: classes, or values.
      pooling: the row's vector: "pooler" (of the first token), the "mean" over its real tokens, or
        the "last" of them, which of a decoder alone has seen all.
      dropout: rate on that vector.
      dtype: of the scores' operands.

    Raises:
      UserError: for numbers that make no model.
    """
    if pooling not in _POOLINGS:
        raise UserError(f"pooling is {pooling!r}." + did_you_mean(str(pooling), _POOLINGS))
    if num_outputs < 1:
        raise UserError(f"num_outputs is {num_outputs}: must be at least 1.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: must be at least 0 and below 1.")
    scores = Linear(features=(num_outputs,), axes=("embed", None), dtype=dtype)
    return Classifier(
        encoder=encoder,
        scores=scores,
        num_outputs=num_outputs,
        pooling=pooling,
        dropout=dropout,
    )


def _shares(real_BT: jax.Array, pooling: Pooling) -> jax.Array:
    """What each token has in its row's vector; all of it is shared, unless nothing is real."""
    if pooling == "last":
        places_T = jnp.arange(real_BT.shape[1])
        last_B1 = jnp.max(jnp.where(real_BT, places_T[None], -1), axis=1, keepdims=True)
        return (places_T[None] == last_B1).astype(jnp.float32)
    count_B1 = jnp.sum(real_BT, axis=1, keepdims=True)
    return real_BT / jnp.maximum(count_B1, 1).astype(jnp.float32)
