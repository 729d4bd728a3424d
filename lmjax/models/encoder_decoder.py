"""The encoder-decoder that every such family fills with its own parts.

B batch, T target length, M source length, D embed, V vocabulary, S cache length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.core import DecoderOutput, Mean
from lmjax.errors import UserError
from lmjax.layers.attention import Attention
from lmjax.layers.cross_attention import CrossAttention
from lmjax.layers.embed import Embed, Unembed
from lmjax.layers.relative import RelativeBias
from lmjax.layers.transformer import Stack
from lmjax.ops.dropout import dropout
from lmjax.sharding import shard


class EncoderDecoderLM(nn.Module):
    """An encoder's stack and a decoder's, of one vocabulary; honours `core.EncoderDecoder`.

    Logits come from `unembed`, or where there is none from the tied embedding, by way of the
    output's `unembedding`.

    Args:
      positions: adds vectors of positions to both sides' token vectors, if given.
      encoder_norm, norm: of what each stack returns; none where blocks normalise last.
      encoder_bias, decoder_bias: added to the scores of all layers of a stack.
      start_id: the token before a target's first.
      hidden_scale: factor of the hidden states of which logits are made.
      dropout: rate on embeddings and on what each stack returns.
      returned_dropout: on the latter; as `dropout` where not given.
    """

    embed: Embed
    encoder: Stack
    decoder: Stack
    max_length: int
    positions: nn.Module | None = None
    encoder_norm: nn.Module | None = None
    norm: nn.Module | None = None
    encoder_bias: RelativeBias | None = None
    decoder_bias: RelativeBias | None = None
    unembed: Unembed | None = None
    start_id: int = 0
    hidden_scale: float = 1.0
    dropout: float = 0.0
    returned_dropout: float | None = None

    @property
    def vocab_size(self) -> int:
        """How many token ids the model knows."""
        return self.embed.vocab_size

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        source_BM: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        source_positions_BM: jax.Array | None = None,
        source_segments_BM: jax.Array | None = None,
        cache: Any = None,
        train: bool = False,
    ) -> DecoderOutput:
        """Returns hidden_BTD with the unembedding, and the cache with these tokens appended.

        Raises UserError for a source or target beyond `max_length`, targets with segments whose
        source has none, and where there is neither a source nor a cache that holds one.
        """
        T = tokens_BT.shape[1]
        if source_BM is None and self.is_initializing():
            source_BM = tokens_BT
        if segments_BT is not None and source_segments_BM is None:
            raise UserError(
                "the targets have segments, and their sources none: a target token sees what of "
                "the source has its own segment. Give the sources segments too."
            )
        memory_BMD: jax.Array | None = None
        aux: dict[str, Mean] = {}
        if source_BM is not None:
            memory_BMD, aux = self._encoded(
                source_BM, source_positions_BM, source_segments_BM, train
            )
        elif cache is None:
            raise UserError("an encoder-decoder needs a source: give source_BM.")
        start: jax.Array | int = 0
        if cache is not None:
            start = cache["length"]
            if source_BM is not None:
                given = source_segments_BM
                own = jnp.ones(source_BM.shape, jnp.int32) if given is None else given
                cache = {**cache, "cross_segments": own}
            source_segments_BM = cache["cross_segments"]
        x_BTD = self._embedded(tokens_BT, positions_BT, start, train)
        bias_HTS = None
        if self.decoder_bias is not None:
            keys = T if cache is None else cache["key"].shape[3]
            bias_HTS = self.decoder_bias(T, keys, offset=start)
        x_BTD, cache, more = self.decoder(
            x_BTD,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            cache=cache,
            memory_BMD=memory_BMD,
            memory_segments_BM=source_segments_BM,
            bias_HTS=bias_HTS,
            train=train,
        )
        if cache is not None:
            cache = {**cache, "length": start + T}
        x_BTD = self._returned(x_BTD, self.norm, train)
        if self.hidden_scale != 1.0:
            x_BTD *= jnp.asarray(self.hidden_scale, x_BTD.dtype)
        unembedding = self.embed.unembedding() if self.unembed is None else self.unembed()
        aux |= {name: aux[name] + mean if name in aux else mean for name, mean in more.items()}
        return DecoderOutput(x_BTD, unembedding, cache, aux)

    def encode(
        self,
        source_BM: jax.Array,
        *,
        positions_BM: jax.Array | None = None,
        segments_BM: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """What the encoder makes of the source, [B, M, D]."""
        return self._encoded(source_BM, positions_BM, segments_BM, train)[0]

    def _encoded(
        self,
        source_BM: jax.Array,
        positions_BM: jax.Array | None,
        segments_BM: jax.Array | None,
        train: bool,
    ) -> tuple[jax.Array, dict[str, Mean]]:
        x_BMD = self._embedded(source_BM, positions_BM, 0, train)
        M = source_BM.shape[1]
        bias = None if self.encoder_bias is None else self.encoder_bias(M, M)
        x_BMD, _, aux = self.encoder(
            x_BMD, positions_BT=positions_BM, segments_BT=segments_BM, bias_HTS=bias, train=train
        )
        return self._returned(x_BMD, self.encoder_norm, train), aux

    def _embedded(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None,
        start: jax.Array | int,
        train: bool,
    ) -> jax.Array:
        T = tokens_BT.shape[1]
        if self.max_length < T:
            raise UserError(f"{T} tokens are longer than the model's max_length {self.max_length}.")
        x_BTD = self.embed(tokens_BT)
        if self.positions is not None:
            index_BT = (start + jnp.arange(T))[None] if positions_BT is None else positions_BT
            x_BTD += jnp.broadcast_to(self.positions(index_BT), x_BTD.shape)
        return shard(self._dropped(x_BTD, self.dropout, train), "batch", "residual", "act_embed")

    def _returned(self, x_BTD: jax.Array, norm: nn.Module | None, train: bool) -> jax.Array:
        rate = self.dropout if self.returned_dropout is None else self.returned_dropout
        return self._dropped(x_BTD if norm is None else norm(x_BTD), rate, train)

    def _dropped(self, x_BTD: jax.Array, rate: float, train: bool) -> jax.Array:
        if not train or rate == 0:
            return x_BTD
        return dropout(x_BTD, rate, self.make_rng("dropout"))

    def init_cache(self, batch_size: int, length: int, *, source_length: int) -> Any:
        """An empty cache for `length` tokens of targets and `source_length` of sources."""
        attention: Attention = self.decoder.block.attention
        cross: CrossAttention = self.decoder.block.cross_attention
        layers = self.decoder.num_layers
        return {
            **attention.init_cache(layers, batch_size, length),
            **cross.init_cache(layers, batch_size, source_length),
            "cross_segments": jnp.zeros((batch_size, source_length), jnp.int32),
        }

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the vocabulary are left out."""
        counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
        for name, table in (("embed", self.embed), ("unembed", self.unembed)):
            if table is not None:
                counts[name] -= (table.num_rows - table.vocab_size) * table.dim
        return counts

    def flop(self, source_length: int, target_length: int) -> tuple[float, float]:
        """FLOP of the forward pass of one pair, logits included: (causal, full attention)."""
        M, T = source_length, target_length
        encoder = self.encoder.num_layers * M * self.encoder.block.flop_per_token(M)[1]
        cross = self.decoder.num_layers * self.decoder.block.cross_attention.flop(T, M)
        logits = 2.0 * self.embed.dim * self.vocab_size * T
        causal, full = (
            self.decoder.num_layers * T * flop for flop in self.decoder.block.flop_per_token(T)
        )
        same = encoder + cross + logits
        return same + causal, same + full
