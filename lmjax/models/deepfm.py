"""DeepFM: a factorisation machine and a perceptron on the same embeddings.

Sources: Guo et al., "DeepFM", arXiv:1703.04247, section 2; the machine: Rendle, "Factorization
Machines", ICDM 2010, equations 1 and 5.

| parameter | initialisation |
|---|---|
| vectors of categories and numbers | normal, std 0.05 |
| weights of both | 0 |
| hidden kernels | He uniform |
| output kernel | Xavier uniform |
| biases | 0 |
"""

# B batch, F features, K categorical columns, N categories, D embed, U units.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax import sharding
from lmjax.core import Batch, Dataset, NetworkOutput, Spec
from lmjax.errors import UserError
from lmjax.layers.dropout import Dropout
from lmjax.layers.embed import Embed
from lmjax.layers.linear import Linear


class DeepFM(nn.Module):
    """w0 + sum of weights + sum over pairs of <v_i, v_j> + mlp(all v): a `core.Network`.

    Each categorical column gives the vector v of its code; each number x gives x times a vector of
    its column. `categories` (int32 [K]) are codes below `num_categories` that no two columns share;
    `features` (float32 [F]) are there or not. The two parts may be switched off, for comparison.

    The table of vectors has a row for each code: split over `tensor` by rows and over `fsdp` by
    columns, as the embeddings of text are.
    """

    num_categories: int
    dim: int
    hidden: Sequence[int]
    num_outputs: int = 1
    dropout: float = 0.0
    factorised: bool = True
    deep: bool = True
    vocab_multiple: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> NetworkOutput:
        """Shapes: categories [B, K], features [B, F] -> values [B, 1]."""
        zeros = nn.initializers.zeros
        codes_BK = batch["categories"]
        table = Embed(
            self.num_categories,
            self.dim,
            vocab_multiple=self.vocab_multiple,
            init_std=0.05,
            dtype="float32",
            name="table",
        )
        rows = table.num_rows
        weights_N = sharding.param(self, "weights", zeros, (rows,), ("vocab",))
        values_B = sharding.param(self, "bias", zeros, (1,), ("norm",))
        values_B = values_B + jnp.sum(weights_N[codes_BK], axis=1)
        vectors_BJD = table(codes_BK).astype(jnp.float32)
        if "features" in batch:
            x_BF = batch["features"].astype(jnp.float32)
            F, normal = x_BF.shape[1], nn.initializers.normal(0.05)
            weights_F = sharding.param(self, "feature_weights", zeros, (F,), ("norm",))
            axes = (None, "embed")
            v_FD = sharding.param(self, "feature_vectors", normal, (F, self.dim), axes)
            values_B += x_BF @ weights_F
            vectors_BJD = jnp.concatenate([vectors_BJD, x_BF[..., None] * v_FD[None]], axis=1)
        if self.factorised:
            sum_BD = jnp.sum(vectors_BJD, axis=1)
            squares_BD = jnp.sum(jnp.square(vectors_BJD), axis=1)
            values_B += 0.5 * jnp.sum(jnp.square(sum_BD) - squares_BD, axis=-1)
        if self.deep:
            x_BU = Dropout(self.dropout)(vectors_BJD.reshape(len(codes_BK), -1), train=train)
            he = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")
            for i, units in enumerate(self.hidden):
                layer = Linear(
                    features=(units,),
                    axes=("embed", "mlp") if i % 2 == 0 else ("mlp", "embed"),
                    kernel_init=he,
                    dtype=self.dtype,
                    name=f"hidden{i + 1}",
                )
                x_BU = Dropout(self.dropout)(nn.relu(layer(x_BU)), train=train)
            out = Linear(
                features=(1,),
                axes=("embed" if len(self.hidden) % 2 == 0 else "mlp", None),
                kernel_init=nn.initializers.xavier_uniform(),
                use_bias=False,
                dtype=self.dtype,
                name="output",
            )
            values_B += out(x_BU)[:, 0].astype(jnp.float32)
        return NetworkOutput(values_B[:, None])

    def check(self, data: Dataset) -> None:
        """Raises UserError where the data has no categories, or more than the model."""
        if "categories" not in data.example:
            raise UserError(
                f"the model reads categories, and {type(data).__name__} has "
                f"{', '.join(data.example)}: give a table with categorical columns."
            )
        columns = getattr(data, "columns", None)
        if columns is not None and columns.num_categories > self.num_categories:
            raise UserError(
                f"the table has {columns.num_categories} categories, and the model's "
                f"num_categories is {self.num_categories}: set it to num_categories(of=data)."
            )

    def flop(self, example: Spec) -> float:
        """FLOP of the forward pass of one example: pairs and products; look-ups cost nothing."""
        fields = example["categories"].shape[0]
        if "features" in example:
            fields += example["features"].shape[0]
        total = 6.0 * fields * self.dim if self.factorised else 0.0
        if self.deep:
            inputs = fields * self.dim
            for units in (*self.hidden, 1):
                total, inputs = total + 2.0 * inputs * units, units
        return total

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the table are left out."""
        counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
        padding = params["weights"].shape[0] - self.num_categories
        counts["table"] -= padding * self.dim
        counts["weights"] -= padding
        return counts


def deepfm(
    *,
    num_categories: int,
    dim: int = 10,
    hidden: Sequence[int] = (400, 400, 400),
    dropout: float = 0.5,
    factorised: bool = True,
    deep: bool = True,
    vocab_multiple: int = 8,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> DeepFM:
    """DeepFM for one yes or no; the sizes that stand here are the paper's (section 3.1).

    Args:
      num_categories: codes of all categorical columns together, `num_categories(of=data)`.
      dim: of the vectors.
      hidden: units of the perceptron's layers.
      dropout: on the perceptron's input and its hidden layers.
      factorised: whether there is a factorisation machine; without it this is a wide and deep net.
      deep: whether there is a perceptron; without it this is a factorisation machine.
      vocab_multiple: the table is padded to a multiple of it.
      dtype: of the perceptron's operands.

    Raises UserError for numbers that make no model.
    """
    if min(num_categories, dim, vocab_multiple, *hidden) < 1:
        raise UserError(
            f"num_categories {num_categories}, dim {dim}, hidden {list(hidden)}, vocab_multiple "
            f"{vocab_multiple}: each must be at least 1."
        )
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: must be at least 0 and below 1.")
    return DeepFM(
        num_categories=num_categories,
        dim=dim,
        hidden=tuple(hidden),
        dropout=dropout,
        factorised=factorised,
        deep=deep,
        vocab_multiple=vocab_multiple,
        dtype=dtype,
    )
