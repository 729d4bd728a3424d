"""Small networks of short texts: all embeddings side by side, or their mean.

Sources: side by side: Bengio et al., "A Neural Probabilistic Language Model", JMLR 3 (2003),
section 2, with classes for words; the mean: Joulin et al., "Bag of Tricks for Efficient Text
Classification", arXiv:1607.01759, section 2.

Departures: from the second, that any number of hidden layers may follow, and words alone count, no
n-grams.

| parameter | initialisation |
|---|---|
| embeddings | normal, std 0.05 |
| kernels | `init`; of a mean without hidden layers zero |
| biases | 0 |
"""

# B batch, T length, D embed, F inputs of the layers, C outputs.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.core import Batch, Dataset, NetworkOutput, Spec
from lmjax.errors import UserError
from lmjax.layers.dense import Dense
from lmjax.layers.dropout import Dropout
from lmjax.layers.embed import Embed
from lmjax.layers.linear import Linear
from lmjax.models.mlp import Dtype, check_network, layers_of
from lmjax.ops.activations import Activation
from lmjax.ops.initializers import Init

Joining = Literal["flat", "mean"]


class ShortText(nn.Module):
    """Embeddings of the tokens, joined, and layers over them; a `core.Network`.

    It reads `tokens` (int32 [T]) and, where there are any, `segments` (0 where a row is padded): a
    padded place is a vector of zeros, and none in the mean.

    Args:
      max_length: of a text; where embeddings stand side by side, that of all.
    """

    embed: Embed
    hidden: tuple[Dense, ...]
    scores: Linear
    num_outputs: int
    max_length: int
    joining: Joining
    dropout: float = 0.0

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> NetworkOutput:
        """Shapes: tokens [B, T] -> values_BC."""
        tokens_BT = batch["tokens"]
        real_BT = (batch["segments"] if "segments" in batch else jnp.ones_like(tokens_BT)) > 0
        x_BTD = self.embed(tokens_BT).astype(jnp.float32) * real_BT[..., None]
        if self.joining == "flat":
            x_BF = x_BTD.reshape(len(x_BTD), -1)
        else:
            count_B = jnp.maximum(jnp.sum(real_BT, axis=1), 1)
            x_BF = jnp.sum(x_BTD, axis=1) / count_B[:, None]
        for layer in self.hidden:
            x_BF = Dropout(self.dropout)(layer(x_BF), train=train)
        return NetworkOutput(self.scores(x_BF).astype(jnp.float32))

    def check(self, data: Dataset) -> None:
        """Raises UserError where the data has no text, another length or more tokens."""
        if "tokens" not in data.example:
            raise UserError(
                f"the model reads text, and {type(data).__name__} has {', '.join(data.example)}: "
                "give data with a column of text."
            )
        length, vocab_size = data.example["tokens"].shape[0], getattr(data, "vocab_size", 0)
        flat = self.joining == "flat"
        if length > self.max_length or (flat and length < self.max_length):
            raise UserError(
                f"data.length is {length}, and the model's max_length {self.max_length}: "
                + ("they must be one number." if flat else "lower the first or raise the second.")
            )
        if vocab_size > self.embed.vocab_size:
            raise UserError(
                f"the tokenizer has {vocab_size} tokens, and the model's vocab_size is "
                f"{self.embed.vocab_size}: set it to at least {vocab_size}."
            )

    def flop(self, example: Spec) -> float:
        """FLOP of the forward pass of one example."""
        inputs = self.embed.dim * (example["tokens"].shape[0] if self.joining == "flat" else 1)
        flop = 0.0
        for layer in self.hidden:
            flop, inputs = flop + layer.flop(inputs), layer.units
        return flop + 2.0 * inputs * self.num_outputs

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the vocabulary are left out."""
        counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
        counts["embed"] -= (self.embed.num_rows - self.embed.vocab_size) * self.embed.dim
        return counts


def flat(
    *,
    num_outputs: int,
    vocab_size: int,
    max_length: int,
    dim: int = 32,
    hidden: Sequence[int] = (64,),
    vocab_multiple: int = 8,
    activation: Activation = "sigmoid",
    init: Init = "xavier_uniform",
    init_std: float = 0.02,
    dropout: float = 0.0,
    dtype: Dtype = "float32",
) -> ShortText:
    """The embeddings of all tokens side by side, dense layers (sigmoid), and the outputs.

    Args:
      num_outputs: classes, or values.
      vocab_size: token ids that the model knows.
      max_length: tokens of every example.
      dim: of an embedding.
      hidden: units of each dense layer.
      vocab_multiple: the embedding table is padded to a multiple of it.
      activation, init, init_std, dropout, dtype: see `models.mlp.mlp`.

    Raises:
      UserError: for numbers that make no model.
    """
    return _short_text(
        "flat",
        num_outputs=num_outputs,
        vocab_size=vocab_size,
        max_length=max_length,
        dim=dim,
        hidden=hidden,
        vocab_multiple=vocab_multiple,
        activation=activation,
        init=init,
        init_std=init_std,
        dropout=dropout,
        dtype=dtype,
    )


def bag(
    *,
    num_outputs: int,
    vocab_size: int,
    max_length: int,
    dim: int = 64,
    hidden: Sequence[int] = (),
    vocab_multiple: int = 8,
    activation: Activation = "relu",
    init: Init = "he_uniform",
    init_std: float = 0.02,
    dropout: float = 0.0,
    dtype: Dtype = "float32",
) -> ShortText:
    """The mean of the tokens' embeddings, and the outputs of it; no order of words. See `flat`."""
    return _short_text(
        "mean",
        num_outputs=num_outputs,
        vocab_size=vocab_size,
        max_length=max_length,
        dim=dim,
        hidden=hidden,
        vocab_multiple=vocab_multiple,
        activation=activation,
        init=init,
        init_std=init_std,
        dropout=dropout,
        dtype=dtype,
    )


def _short_text(
    joining: Joining,
    *,
    num_outputs: int,
    vocab_size: int,
    max_length: int,
    dim: int,
    hidden: Sequence[int],
    vocab_multiple: int,
    dropout: float,
    dtype: Dtype,
    **kernels: Any,
) -> ShortText:
    check_network(num_outputs=num_outputs, hidden=hidden, dropout=dropout)
    for name, size in (("vocab_size", vocab_size), ("max_length", max_length), ("dim", dim)):
        if size < 1:
            raise UserError(f"{name} is {size}: must be at least 1.")
    inputs = "embed" if joining == "mean" else None
    layers, scores = layers_of(hidden, num_outputs, inputs, dtype=dtype, **kernels)
    return ShortText(
        embed=Embed(vocab_size, dim, vocab_multiple=vocab_multiple, init_std=0.05, dtype=dtype),
        hidden=layers,
        scores=scores,
        num_outputs=num_outputs,
        max_length=max_length,
        joining=joining,
        dropout=dropout,
    )
