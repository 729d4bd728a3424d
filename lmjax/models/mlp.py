"""Linear models and multilayer perceptrons of tables.

Sources: Rosenblatt (1958) and Rumelhart et al., "Learning representations by back-propagating
errors", Nature 323 (1986); without hidden layers this is a linear model, of regression with
`tasks.regress.Regress`, or logistic regression (McCullagh & Nelder, 1989, chapters 4 and 5) with
`tasks.classify.Classify`.

| parameter | initialisation |
|---|---|
| hidden kernels | `init` |
| output kernel | `init`; of a linear model zero |
| biases | 0 |
| category table | normal, std 0.05 |
"""

# B batch, F features, K categorical columns, N categories, D embed, H units, C outputs.

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
from lmjax.ops import activations
from lmjax.ops.activations import Activation
from lmjax.ops.initializers import Init, initializer

Dtype = Literal["float32", "bfloat16"]


class Mlp(nn.Module):
    """Hidden layers over features and categories; a `core.Network`.

    A row's input is its `features` (float32 [F]) and its `categories` (int32 [K], codes below
    `num_categories` that no two columns share): as zeros and ones, one for each code, or, with a
    `table`, as a vector for each column.
    """

    hidden: tuple[Dense, ...]
    scores: Linear
    num_outputs: int
    num_categories: int = 0
    table: Embed | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> NetworkOutput:
        """Shapes: features [B, F], categories [B, K] -> values_BC."""
        parts = [batch["features"].astype(jnp.float32)] if "features" in batch else []
        if "categories" in batch:
            codes_BK = batch["categories"]
            if self.table is None:
                ones_BKN = jax.nn.one_hot(codes_BK, self.num_categories, dtype=jnp.float32)
                parts.append(jnp.sum(ones_BKN, axis=1))
            else:
                x_BKD = self.table(codes_BK).astype(jnp.float32)
                parts.append(x_BKD.reshape(len(x_BKD), -1))
        x_BF = jnp.concatenate(parts, axis=-1)
        for layer in self.hidden:
            x_BF = Dropout(self.dropout)(layer(x_BF), train=train)
        return NetworkOutput(self.scores(x_BF).astype(jnp.float32))

    def check(self, data: Dataset) -> None:
        """Raises UserError where the data is no table, or has more categories than the model."""
        if not {"features", "categories"} & set(data.example):
            raise UserError(
                f"the model reads features and categories, and {type(data).__name__} has "
                f"{', '.join(data.example)}: give a table with columns of numbers or categories."
            )
        columns = getattr(data, "columns", None)
        count = columns.num_categories if columns is not None else self.num_categories
        if "categories" in data.example and count > self.num_categories:
            raise UserError(
                f"the table has {count} categories, and the model's num_categories is "
                f"{self.num_categories}: set it to num_categories(of=data)."
            )

    def flop(self, example: Spec) -> float:
        """FLOP of the forward pass of one example."""
        inputs = example["features"].shape[0] if "features" in example else 0
        if "categories" in example:
            K = example["categories"].shape[0]
            inputs += self.num_categories if self.table is None else K * self.table.dim
        flop = 0.0
        for layer in self.hidden:
            flop, inputs = flop + layer.flop(inputs), layer.units
        return flop + 2.0 * inputs * self.num_outputs

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the table are left out."""
        counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
        if self.table is not None and "table" in counts:
            counts["table"] -= (self.table.num_rows - self.table.vocab_size) * self.table.dim
        return counts


def mlp(
    *,
    num_outputs: int,
    hidden: Sequence[int] = (),
    num_categories: int = 0,
    category_dim: int = 0,
    activation: Activation = "relu",
    init: Init = "he_uniform",
    init_std: float = 0.02,
    dropout: float = 0.0,
    vocab_multiple: int = 8,
    dtype: Dtype = "float32",
) -> Mlp:
    """A linear model (`hidden` is empty), or a perceptron with layers of so many units.

    Args:
      num_outputs: classes, or values; 1 for logistic regression of two classes.
      hidden: units of each hidden layer.
      num_categories: codes of all categorical columns, 0 where there are none.
      category_dim: of a vector for each code; 0 for zeros and ones.
      activation: of the hidden layers.
      init: of the kernels, by name, see `ops.initializers`.
      init_std: of those kinds that have one.
      dropout: rate on what each hidden layer gives.
      vocab_multiple: the table of categories is padded to a multiple of it.
      dtype: of the products' operands.

    Raises:
      UserError: for numbers that make no model.
    """
    check_network(num_outputs=num_outputs, hidden=hidden, dropout=dropout)
    if num_categories < 0 or category_dim < 0:
        raise UserError(
            f"num_categories is {num_categories} and category_dim {category_dim}: neither may be "
            "negative."
        )
    layers, scores = layers_of(
        hidden, num_outputs, None, activation=activation, init=init, init_std=init_std, dtype=dtype
    )
    table = None
    if category_dim and num_categories:
        table = Embed(
            num_categories, category_dim, vocab_multiple=vocab_multiple, init_std=0.05, dtype=dtype
        )
    return Mlp(
        hidden=layers,
        scores=scores,
        num_outputs=num_outputs,
        num_categories=num_categories,
        table=table,
        dropout=dropout,
    )


def layers_of(
    hidden: Sequence[int],
    num_outputs: int,
    inputs: str | None,
    *,
    activation: Activation,
    init: Init,
    init_std: float,
    dtype: str,
) -> tuple[tuple[Dense, ...], Linear]:
    """Hidden layers over inputs with this name of their axis, and the layer of the outputs.

    The units of every other layer are split over the tensor axis, as in the two products of an MLP;
    the numbers of inputs and outputs are the data's, and split over nothing.

    Raises UserError for a name of an activation or initialiser that stands for nothing.
    """
    activations.activation(activation)
    initial = initializer(init, std=init_std)
    layers, last = [], inputs
    for units in hidden:
        name = "embed" if last == "mlp" else "mlp"
        layers.append(
            Dense(
                units=units,
                axes=(last, name),
                activation=activation,
                kernel_init=init,
                init_std=init_std,
                dtype=dtype,
            )
        )
        last = name
    first = initial if hidden else nn.initializers.zeros
    scores = Linear(features=(num_outputs,), axes=(last, None), kernel_init=first, dtype=dtype)
    return tuple(layers), scores


def check_network(*, num_outputs: int, hidden: Sequence[int], dropout: float) -> None:
    """Raises UserError for sizes that make no network."""
    if num_outputs < 1 or any(units < 1 for units in hidden):
        raise UserError(
            f"num_outputs is {num_outputs} and hidden {list(hidden)}: each must be at least 1."
        )
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: must be at least 0 and below 1.")
