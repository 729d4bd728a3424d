"""Token and position embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax import sharding
from lmjax.core import Unembedding
from lmjax.ops.lookup import lookup
from lmjax.ops.matmul import activation_dtype


class Embed(nn.Module):
    """A table of token vectors, which also makes logits where it is tied.

    Source: Press & Wolf, "Using the Output Embedding to Improve Language Models", arXiv:1608.05859.
    The table has `vocab_size` rows, rounded up to `vocab_multiple`; the padding is never read as a
    token and never given probability (`Unembedding`).

    Args:
      scale: factor on the vectors that are looked up, not on the tied output layer.
      softcap: of the tied output layer, see `Unembedding`.
    """

    vocab_size: int
    dim: int
    vocab_multiple: int = 1
    init_std: float = 0.02
    dtype: str = "float32"
    scale: float = 1.0
    softcap: float | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the table, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def setup(self) -> None:
        """Declares the table."""
        init = nn.initializers.normal(self.init_std)
        shape, axes = (self.num_rows, self.dim), ("vocab", "embed")
        self.table_VD = sharding.param(self, "table", init, shape, axes)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Shapes: [B, T] -> [B, T, D]."""
        dtype = activation_dtype(self.dtype)
        x_BTD = lookup(self.table_VD, tokens_BT, rows="vocab", dtype=dtype)
        return x_BTD if self.scale == 1.0 else x_BTD * jnp.asarray(self.scale, dtype)

    def unembedding(self) -> Unembedding:
        """The tied output layer."""
        return Unembedding(self.table_VD, self.vocab_size, self.dtype, self.softcap)


class Unembed(nn.Module):
    """An output layer of its own: a row for each token, and a bias if asked for.

    The table has `vocab_size` rows, rounded up to `vocab_multiple`; the padding is never given
    probability (`Unembedding`).

    Args:
      softcap: see `Unembedding`.
      use_bias: whether each row has a bias, 0 at the start.
    """

    vocab_size: int
    dim: int
    vocab_multiple: int = 1
    init_std: float = 0.02
    dtype: str = "float32"
    softcap: float | None = None
    use_bias: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the table, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @nn.compact
    def __call__(self) -> Unembedding:
        """The map from hidden states to logits."""
        init = nn.initializers.normal(self.init_std)
        shape, axes = (self.num_rows, self.dim), ("vocab", "embed")
        table_VD = sharding.param(self, "table", init, shape, axes)
        bias_V = None
        if self.use_bias:
            bias_V = sharding.param(self, "bias", nn.initializers.zeros, shape[:1], axes[:1])
        return Unembedding(table_VD, self.vocab_size, self.dtype, self.softcap, bias_V)


class TokenTypes(nn.Module):
    """A learned vector for each kind of token: of the first text of a pair, of the second.

    Source: the segment embeddings of Devlin et al. (BERT), arXiv:1810.04805, figure 2.
    """

    num_types: int
    dim: int
    init_std: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, types_BT: jax.Array) -> jax.Array:
        """Shapes: [B, T] -> [B, T, D]."""
        init = nn.initializers.normal(self.init_std)
        shape, axes = (self.num_types, self.dim), ("token_types", "embed")
        table_ND = sharding.param(self, "table", init, shape, axes)
        return lookup(table_ND, types_BT, rows="token_types", dtype=activation_dtype(self.dtype))


class LearnedPositions(nn.Module):
    """A learned vector for each position up to `max_length`."""

    max_length: int
    dim: int
    init_std: float = 0.01
    dtype: str = "float32"

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        """Shapes: [B, T] -> [B, T, D]."""
        init = nn.initializers.normal(self.init_std)
        shape, axes = (self.max_length, self.dim), ("positions", "embed")
        table_TD = sharding.param(self, "table", init, shape, axes)
        return lookup(table_TD, positions_BT, rows="positions", dtype=activation_dtype(self.dtype))
