"""The decoder-only language model that every such family fills with its own parts.

B batch, T length, D embed, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.core import DecoderOutput, Mean
from lmjax.errors import UserError
from lmjax.layers.attention import Attention
from lmjax.layers.dropout import Dropout
from lmjax.layers.embed import Embed, LearnedPositions, Unembed
from lmjax.layers.transformer import Stack
from lmjax.sharding import shard

LARGEST = 2**24  # of any size: 100 times the largest in use, and arrays of it still fit


class Stacks(nn.Module):
    """Stacks of unlike blocks, one after another; their attention has one shape, and one cache.

    The `first_layer` of each part's attention says where its layers begin in the cache.
    """

    parts: tuple[Stack, ...]

    def __call__(
        self, x_BTD: jax.Array, *, cache: Any = None, **arguments: Any
    ) -> tuple[jax.Array, Any, dict[str, Mean]]:
        """Returns (x_BTD, cache, aux), the Means of aux added over the parts."""
        aux: dict[str, Mean] = {}
        for part in self.parts:
            x_BTD, cache, more = part(x_BTD, cache=cache, **arguments)
            aux |= {name: aux[name] + mean if name in aux else mean for name, mean in more.items()}
        return x_BTD, cache, aux


class DecoderLM(nn.Module):
    """Embeds tokens (and positions, if given), runs the blocks, normalises; honours `core.Decoder`.

    Logits come from `unembed`, or where there is none from the tied embedding, by way of the
    output's `unembedding`.
    """

    embed: Embed
    positions: LearnedPositions | None
    blocks: Stack | Stacks
    norm: nn.Module
    max_length: int
    dropout: float = 0.0
    unembed: Unembed | None = None

    @property
    def vocab_size(self) -> int:
        """How many token ids the model knows."""
        return self.embed.vocab_size

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Any = None,
        train: bool = False,
    ) -> DecoderOutput:
        """Returns hidden_BTD with the unembedding, and the cache with these tokens appended."""
        T = tokens_BT.shape[1]
        if self.max_length < T:
            raise UserError(f"{T} tokens are longer than the model's max_length {self.max_length}.")
        x_BTD = self.embed(tokens_BT)
        if self.positions is not None:
            start = 0 if cache is None else cache["length"]
            index_BT = (start + jnp.arange(T))[None] if positions_BT is None else positions_BT
            x_BTD += jnp.broadcast_to(self.positions(index_BT), x_BTD.shape)
        x_BTD = Dropout(self.dropout)(x_BTD, train=train)
        x_BTD = shard(x_BTD, "batch", "residual", "act_embed")
        x_BTD, cache, aux = self.blocks(
            x_BTD, positions_BT=positions_BT, segments_BT=segments_BT, cache=cache, train=train
        )
        if cache is not None:
            cache = {**cache, "length": cache["length"] + T}
        unembedding = self.embed.unembedding() if self.unembed is None else self.unembed()
        return DecoderOutput(self.norm(x_BTD), unembedding, cache, aux)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks as stacks of like layers, in their order."""
        return self.blocks.parts if isinstance(self.blocks, Stacks) else (self.blocks,)

    def init_cache(self, batch_size: int, length: int) -> Any:
        """An empty cache for `length` tokens."""
        num_layers = sum(stack.num_layers for stack in self.stacks)
        attention: Attention = self.stacks[0].block.attention
        return attention.init_cache(num_layers, batch_size, length)

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the vocabulary are left out."""
        counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
        for name, table in (("embed", self.embed), ("unembed", self.unembed)):
            if table is not None:
                counts[name] -= (table.num_rows - table.vocab_size) * table.dim
        return counts

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass, logits included: (causal attention, full attention)."""
        logits = 2.0 * self.embed.dim * self.vocab_size
        costs = [(s.num_layers, *s.block.flop_per_token(length)) for s in self.stacks]
        causal = sum(layers * flop for layers, flop, _ in costs)
        return causal + logits, sum(layers * flop for layers, _, flop in costs) + logits


def check_sizes(**sizes: int) -> None:
    """Raises UserError for a size that is below 1 or beyond any model, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}: must be at least 1.")
        if size > LARGEST:
            raise UserError(f"{name} is {size}: must be at most {LARGEST}.")


def check_heads(dim: int, num_heads: int) -> None:
    """Raises UserError where the heads do not divide `dim`, with those that would."""
    if dim % num_heads:
        fits = [n for n in range(1, min(dim, 2 * num_heads) + 1) if dim % n == 0]
        raise UserError(
            f"dim {dim} is no multiple of num_heads {num_heads}: "
            f"choose one of {fits}, or set head_dim."
        )
