"""BERT.

Sources: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", arXiv:1810.04805, section 3 and its released code; small sizes: Turc et al.,
"Well-Read Students Learn Better", arXiv:1908.08962, table 1; `minilm-l6`, `minilm-l12`: Wang et
al., "MiniLM", arXiv:2002.10957 (every second layer of it, and all).

Departures:
  - Weights are drawn from the whole normal distribution, not truncated at two deviations.
  - There is no head for next sentences: the pooler that it stands on is there.

| parameter | initialisation |
|---|---|
| embeddings of tokens, positions and token types, kernels | normal, std 0.02 |
| biases, norm bias | 0 |
| norm scale | 1 |
"""

# B batch, T length, D embed, V vocabulary.

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax import sharding
from lmjax.core import EncoderOutput
from lmjax.errors import UserError, did_you_mean
from lmjax.layers.attention import Attention
from lmjax.layers.dropout import Dropout
from lmjax.layers.embed import Embed, LearnedPositions, TokenTypes
from lmjax.layers.linear import Linear
from lmjax.layers.mlp import GeluMlp
from lmjax.layers.norm import LayerNorm
from lmjax.layers.transformer import Block, Remat, Stack
from lmjax.models.decoder import check_heads, check_sizes
from lmjax.ops.activations import gelu, gelu_erf
from lmjax.sharding import shard

# name: (num_layers, dim, num_heads); an MLP has 4 dim hidden units
BERT_SIZES = {
    "nano": (4, 256, 8),  # not Google's: for a CPU and for tests
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "minilm-l6": (6, 384, 12),
    "minilm-l12": (12, 384, 12),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
Dtype = Literal["float32", "bfloat16"]
Gelu = Literal["erf", "tanh"]


class Bert(nn.Module):
    """Embeds tokens, positions and token types, normalises, runs the blocks; a `core.Encoder`.

    `pooled_BD` is tanh of the pooler of each row's first token, and `predicting_BTD` what `head`
    makes of hidden states for the tied output layer.
    """

    embed: Embed
    positions: LearnedPositions
    token_types: TokenTypes
    embed_norm: LayerNorm
    blocks: Stack
    max_length: int
    dropout: float = 0.0
    pooler: Linear | None = None
    head: TokenHead | None = None

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
        token_types_BT: jax.Array | None = None,
        train: bool = False,
    ) -> EncoderOutput:
        """Returns the hidden states and, of the heads that there are, what they make of them."""
        T = tokens_BT.shape[1]
        if self.max_length < T:
            raise UserError(f"{T} tokens are longer than the model's max_length {self.max_length}.")
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None]
        if token_types_BT is None:
            token_types_BT = jnp.zeros((1, T), jnp.int32)
        x_BTD = self.embed(tokens_BT)
        for table, index_BT in (
            (self.positions, positions_BT),
            (self.token_types, token_types_BT),
        ):
            x_BTD += jnp.broadcast_to(table(index_BT), x_BTD.shape)
        x_BTD = self.embed_norm(shard(x_BTD, "batch", "residual", "act_embed"))
        x_BTD = Dropout(self.dropout)(x_BTD, train=train)
        x_BTD = shard(x_BTD, "batch", "residual", "act_embed")
        x_BTD, _, aux = self.blocks(x_BTD, segments_BT=segments_BT, train=train)
        output = EncoderOutput(x_BTD, aux=aux)
        if self.pooler is not None:
            output = replace(output, pooled_BD=jnp.tanh(self.pooler(x_BTD[:, 0])))
        if self.head is not None:
            y_BTD, bias_V = self.head(x_BTD, num_rows=self.embed.num_rows)
            unembedding = replace(self.embed.unembedding(), bias_V=bias_V)
            output = replace(output, predicting_BTD=y_BTD, unembedding=unembedding)
        return output

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the vocabulary are left out."""
        counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
        padding = self.embed.num_rows - self.embed.vocab_size
        counts["embed"] -= padding * self.embed.dim
        if self.head is not None:
            counts["head"] -= padding
        return counts

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass, logits included, twice: no attention is causal."""
        dim = self.embed.dim
        flop = self.blocks.num_layers * self.blocks.block.flop_per_token(length)[1]
        if self.pooler is not None:
            flop += 2.0 * dim * dim / length
        if self.head is not None:
            flop += 2.0 * dim * (dim + self.vocab_size)
        return flop, flop


class TokenHead(nn.Module):
    """norm(gelu(x W + b)), of which a tied output layer with a bias makes logits.

    Source: the released code of BERT, `get_masked_lm_output`.
    """

    dense: Linear
    norm: LayerNorm
    form: Gelu = "erf"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, num_rows: int) -> tuple[jax.Array, jax.Array]:
        """Returns (y_BTD, the output layer's bias_V); `num_rows` of it with those that pad it."""
        activation = gelu if self.form == "tanh" else gelu_erf
        y_BTD = self.norm(activation(self.dense(x_BTD), dtype=self.dtype))
        init = nn.initializers.zeros
        bias_V = sharding.param(self, "bias", init, (num_rows,), ("vocab",))
        return shard(y_BTD, "batch", "residual", "act_embed"), bias_V


def bert(
    *,
    size: str = "base",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    hidden: int | None = None,
    vocab_size: int = 30522,
    max_length: int = 512,
    num_token_types: int = 2,
    pooler: bool = True,
    token_head: bool = False,
    activation: Gelu = "erf",
    dropout: float = 0.1,
    attention_dropout: float | None = None,
    epsilon: float = 1e-12,
    init_std: float = 0.02,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> Bert:
    """BERT base (109,482,240 parameters with pooler, without token head), large (335,141,888), ...

    Numbers that are given stand in the place of the preset's.

    Args:
      size: one of `BERT_SIZES`.
      hidden: units of an MLP; 4 dim where not given.
      num_token_types: parts of a row that token types tell apart.
      pooler: whether there is one, for classifying rows.
      token_head: whether there is a head that predicts masked tokens.
      activation: GELU as it is defined ('erf'), or its tanh form.
      dropout: rate on embeddings and both branches of each block.
      attention_dropout: rate on attention probabilities; `dropout` where not given.
      epsilon: of the norms.
      init_std: of every table and kernel. BERT's own suits a width of 768; a narrower model needs
        more of it (a product's outputs shrink with the root of the width), or its attention stays
        even for thousands of steps.
      vocab_multiple: the embedding table is padded to a multiple of it.
      dtype: of the products' operands; parameters are float32.
      remat: see `Stack`.
      unroll: see `Stack`.

    Raises:
      UserError: for an unknown size, and for numbers that make no model.
    """
    if size not in BERT_SIZES:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, BERT_SIZES))
    preset = zip((num_layers, dim, num_heads), BERT_SIZES[size], strict=True)
    num_layers, dim, num_heads = (own if given is None else given for given, own in preset)
    hidden = 4 * dim if hidden is None else hidden
    check_sizes(
        num_layers=num_layers,
        dim=dim,
        num_heads=num_heads,
        hidden=hidden,
        vocab_size=vocab_size,
        max_length=max_length,
        num_token_types=num_token_types,
        vocab_multiple=vocab_multiple,
        unroll=unroll,
    )
    attention_dropout = dropout if attention_dropout is None else attention_dropout
    for name, rate in (("dropout", dropout), ("attention_dropout", attention_dropout)):
        if not 0 <= rate < 1:
            raise UserError(f"{name} is {rate}: must be at least 0 and below 1.")
    if not 0 < epsilon < 1:
        raise UserError(f"epsilon is {epsilon}: must be above 0 and below 1.")
    if not 0 < init_std < 1:
        raise UserError(f"init_std is {init_std}: must be above 0 and below 1.")
    if activation not in ("erf", "tanh"):
        raise UserError(
            f"activation is {activation!r}." + did_you_mean(activation, ("erf", "tanh"))
        )
    check_heads(dim, num_heads)
    norm = partial(LayerNorm, epsilon=epsilon, dtype=dtype)
    drawn: dict[str, Any] = {"init_std": init_std, "dtype": dtype}
    square = partial(Linear, features=(dim,), axes=("embed", None), **drawn)
    head = TokenHead(square(), norm(), form=activation, dtype=dtype)
    return Bert(
        embed=Embed(vocab_size, dim, vocab_multiple=vocab_multiple, **drawn),
        positions=LearnedPositions(max_length, dim, **drawn),
        token_types=TokenTypes(num_token_types, dim, **drawn),
        embed_norm=norm(),
        blocks=Stack(
            block=Block(
                attention_norm=norm(),
                attention=Attention(
                    dim=dim,
                    num_heads=num_heads,
                    num_kv_heads=num_heads,
                    head_dim=dim // num_heads,
                    dropout=attention_dropout,
                    init_std=init_std,
                    out_std=init_std,
                    dtype=dtype,
                    causal=False,
                ),
                mlp_norm=norm(),
                mlp=GeluMlp(dim=dim, hidden=hidden, out_std=init_std, form=activation, **drawn),
                dropout=dropout,
                norm_first=False,
            ),
            num_layers=num_layers,
            remat=remat,
            unroll=unroll,
        ),
        max_length=max_length,
        dropout=dropout,
        pooler=square() if pooler else None,
        head=head if token_head else None,
    )
