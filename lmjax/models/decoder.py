"""The decoder-only language model that every such family fills with its own parts.

B batch, T length, D embed, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.core import DecoderOutput
from lmjax.errors import UserError
from lmjax.layers.dropout import Dropout
from lmjax.layers.embed import Embed, LearnedPositions
from lmjax.layers.transformer import Stack
from lmjax.sharding import shard


class DecoderLM(nn.Module):
    """Embeds tokens (and positions, if given), runs the blocks, normalises; honours `core.Decoder`.

    Logits come from the tied embedding, by way of the output's `unembedding`.
    """

    embed: Embed
    positions: LearnedPositions | None
    blocks: Stack
    norm: nn.Module
    max_length: int
    dropout: float = 0.0

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
            if positions_BT is None:
                start = 0 if cache is None else cache["length"]
                positions_BT = (start + jnp.arange(T))[None]
            x_BTD += jnp.broadcast_to(self.positions(positions_BT), x_BTD.shape)
        x_BTD = Dropout(self.dropout)(x_BTD, train=train)
        x_BTD = shard(x_BTD, "batch", "residual", "act_embed")
        x_BTD, cache = self.blocks(x_BTD, segments_BT=segments_BT, cache=cache, train=train)
        if cache is not None:
            cache = {**cache, "length": cache["length"] + T}
        return DecoderOutput(self.norm(x_BTD), self.embed.unembedding(), cache)

    def init_cache(self, batch_size: int, length: int) -> Any:
        """An empty cache for `length` tokens."""
        return self.blocks.block.attention.init_cache(self.blocks.num_layers, batch_size, length)

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the vocabulary are left out."""
        counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
        counts["embed"] -= (self.embed.num_rows - self.embed.vocab_size) * self.embed.dim
        return counts

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass, logits included: (causal attention, full attention)."""
        logits = 2.0 * self.embed.dim * self.vocab_size
        causal, full = self.blocks.block.flop_per_token(length)
        return self.blocks.num_layers * causal + logits, self.blocks.num_layers * full + logits
