"""Recurrent language models: LSTM and GRU, with plain or variational dropout.

Sources: Zaremba, Sutskever & Vinyals, "Recurrent Neural Network Regularization", arXiv:1409.2329
(layers, plain dropout); Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in
Recurrent Neural Networks", arXiv:1512.05287 (variational dropout); Press & Wolf, arXiv:1608.05859
(the tied output layer, behind a projection where the sizes differ).

Departures:
  - one bias of the gates where torch and cuDNN add two;
  - the initialisation, and a forget gate that starts open (`layers.recurrent`);
  - dropout masks of a row are drawn anew for every part of a text that is read in parts.

| parameter | initialisation |
|---|---|
| embedding, output layer of its own | normal, std 0.1 (0.02 where tied) |
| input and recurrent kernels | see `layers.recurrent` |
| projection | Glorot, uniform |
| biases | 0 |
"""

# Shape legend: B batch, T length, D embed, H units, L layers, V vocabulary.

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax import sharding
from lmjax.core import CARRY, DecoderOutput
from lmjax.errors import UserError, did_you_mean
from lmjax.layers.dropout import Dropout
from lmjax.layers.embed import Embed, Unembed
from lmjax.layers.linear import Linear
from lmjax.layers.recurrent import (
    DropoutKind,
    Kind,
    Recurrent,
    SharedDropout,
    WordDropout,
    keep_within,
)
from lmjax.models.decoder import check_sizes
from lmjax.ops.recurrent import State
from lmjax.sharding import shard

Dtype = Literal["float32", "bfloat16"]

_NAMES = ("hidden", "cell")  # of a state's parts; a GRU has the first
_NO_END = 2**31 - 1


class RecurrentLM(nn.Module):
    """Embeds tokens and runs recurrent layers; honours `core.Decoder`, its cache the layers' state.

    The cache holds `hidden` and `cell`, [L, B, H], the number of tokens read (`length`), and the
    slot `end` from which on the tokens of the next call are padding at the right, if they are. It
    takes the same room whatever the length.

    With `stateful`, training goes on where the batch before ended: the collection `carry` has
    `hidden` and `cell` of each row, [B, L, H] (truncated backpropagation through time). What is no
    training begins each row anew.

    Args:
      max_length: the longest text that is read at once; the layers themselves know no bound.
      dropout: rate on the inputs of every layer and on the output of the last.
      dropout_kind: whether these masks are drawn for each token ("plain") or shared by all tokens
        of a row ("variational").
      word_dropout: rate of `WordDropout` on the embedding.
    """

    embed: Embed
    layers: tuple[Recurrent, ...]
    project: Linear | None = None
    unembed: Unembed | None = None
    max_length: int = 4096
    dropout: float = 0.0
    dropout_kind: DropoutKind = "plain"
    word_dropout: float = 0.0
    stateful: bool = False

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
        del positions_BT  # the state knows where it is
        B, T = tokens_BT.shape
        if self.max_length < T:
            raise UserError(f"{T} tokens are longer than the model's max_length {self.max_length}.")
        if sharding.pipeline().stages > 1:
            raise UserError(
                f"the mesh has stage={sharding.pipeline().stages}, and recurrent layers do not run "
                "as a pipeline: set stage=1, and use data or fsdp."
            )
        states = tuple(layer.zeros(B) for layer in self.layers)
        carry: dict[str, Any] = {}
        end = None
        if cache is not None:
            states = _by_layer(cache, axis=0)
            end = jnp.clip(cache["end"] - cache["length"], 1, T)
            if segments_BT is None and "segments" in cache:
                # Behind the slots that were counted in advance all tokens are of a row's own.
                segments_BT = jax.lax.dynamic_slice_in_dim(
                    cache["segments"], cache["length"], T, axis=1
                )
        elif self.stateful and (train or self.is_initializing()):
            start = _by_name(states, axis=1)
            carry = {name: self.variable(CARRY, name, lambda x=x: x) for name, x in start.items()}
            states = _by_layer({name: kept.value for name, kept in carry.items()}, axis=1)
        keep_BT = keep_within(segments_BT)

        x_BTD = self.embed(tokens_BT)
        x_BTD = WordDropout(self.word_dropout, self.vocab_size)(x_BTD, tokens_BT, train=train)
        x_BTD = shard(x_BTD, "batch", "residual", "act_embed")
        drop = Dropout if self.dropout_kind == "plain" else SharedDropout
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x_BTD = drop(self.dropout)(x_BTD, train=train)
            x_BTD, state = layer(x_BTD, state=state, keep_BT=keep_BT, end=end, train=train)
            after.append(state)
        x_BTD = drop(self.dropout)(x_BTD, train=train)
        if self.project is not None:
            x_BTD = shard(self.project(x_BTD), "batch", "residual", "act_embed")

        if cache is not None:
            cache = {
                **cache,
                **_by_name(after, axis=0),
                "length": cache["length"] + T,
                "end": jnp.full_like(cache["end"], _NO_END),
            }
        if not self.is_initializing():
            for name, x in _by_name(after, axis=1).items() if carry else ():
                carry[name].value = x
        unembedding = self.embed.unembedding() if self.unembed is None else self.unembed()
        return DecoderOutput(x_BTD, unembedding, cache)

    def init_cache(self, batch_size: int, length: int) -> Any:
        """The state before any token, which has room for any `length`."""
        del length
        states = tuple(layer.zeros(batch_size) for layer in self.layers)
        counts = {"length": jnp.zeros((), jnp.int32), "end": jnp.full((), _NO_END, jnp.int32)}
        return {**_by_name(states, axis=0), **counts}

    def count_params(self, params: Any) -> dict[str, int]:
        """Parameters by part; rows that pad the vocabulary are left out."""
        counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
        counts["embed"] -= (self.embed.num_rows - self.embed.vocab_size) * self.embed.dim
        if (last := self.unembed) is not None:
            counts["unembed"] -= (last.num_rows - last.vocab_size) * (last.dim + last.use_bias)
        return counts

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass, logits included: twice (there is no attention)."""
        del length
        dims = (self.embed.dim, *(layer.units for layer in self.layers))
        flop = sum(
            layer.flop_per_token(dim) for layer, dim in zip(self.layers, dims[:-1], strict=True)
        )
        flop += 0.0 if self.project is None else 2.0 * dims[-1] * self.embed.dim
        last = self.embed if self.unembed is None else self.unembed
        flop += 2.0 * last.dim * self.vocab_size
        return flop, flop


def lstm(
    *,
    vocab_size: int,
    num_layers: int = 1,
    dim: int = 256,
    units: int = 1024,
    tied: bool = True,
    stateful: bool = False,
    max_length: int = 4096,
    dropout: float = 0.0,
    dropout_kind: DropoutKind = "plain",
    recurrent_dropout: float | None = None,
    word_dropout: float | None = None,
    kind: Kind = "lstm",
    forget_bias: float = 1.0,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
) -> RecurrentLM:
    """An LSTM language model of any size, or of gated recurrent units.

    With 10,000 tokens, not tied, and the other sizes as they are by default it has 18,056,976
    parameters.

    Args:
      num_layers: recurrent layers, all of `units` cells.
      dim: width of the embedding.
      units: cells of a layer.
      tied: whether the embedding makes the logits too, of a projection to its width where `units`
        is not `dim`. Otherwise the output layer is its own, and has a bias.
      stateful: whether training goes on where the batch before ended; wants data in the order
        "continued". See `RecurrentLM`.
      max_length: see `RecurrentLM`.
      dropout: see `RecurrentLM`.
      dropout_kind: see `RecurrentLM`.
      recurrent_dropout: rate on hidden states where they meet the recurrent weights; where not
        given it is `dropout` if that is variational, and 0 if plain.
      word_dropout: rate of embedding rows; where not given, likewise.
      kind: "lstm" or "gru".
      forget_bias: see `layers.recurrent.Recurrent`.
      vocab_multiple: the embedding table is padded to a multiple of it.
      dtype: of the products' operands; parameters and states are float32.
    """
    check_sizes(
        num_layers=num_layers,
        dim=dim,
        units=units,
        vocab_size=vocab_size,
        max_length=max_length,
        vocab_multiple=vocab_multiple,
    )
    if dropout_kind not in get_args(DropoutKind):
        allowed = get_args(DropoutKind)
        raise UserError(f"dropout_kind is {dropout_kind!r}." + did_you_mean(dropout_kind, allowed))
    shared = dropout if dropout_kind == "variational" else 0.0
    rates = {
        "dropout": dropout,
        "recurrent_dropout": shared if recurrent_dropout is None else recurrent_dropout,
        "word_dropout": shared if word_dropout is None else word_dropout,
    }
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise UserError(f"{name} is {rate}: must be at least 0 and below 1.")
    std = 0.02 if tied else 0.1
    layer = Recurrent(
        units=units,
        kind=kind,
        forget_bias=forget_bias,
        dropout=rates["recurrent_dropout"],
        dtype=dtype,
    )
    project = Linear(
        (dim,), (None, "embed"), kernel_init=nn.initializers.glorot_uniform(), dtype=dtype
    )
    last = Unembed(
        vocab_size, units, vocab_multiple=vocab_multiple, init_std=std, dtype=dtype, use_bias=True
    )
    return RecurrentLM(
        embed=Embed(vocab_size, dim, vocab_multiple=vocab_multiple, init_std=std, dtype=dtype),
        layers=tuple(layer.clone() for _ in range(num_layers)),
        project=project if tied and units != dim else None,
        unembed=None if tied else last,
        max_length=max_length,
        dropout=dropout,
        dropout_kind=dropout_kind,
        word_dropout=rates["word_dropout"],
        stateful=stateful,
    )


def _by_name(states: Any, *, axis: int) -> dict[str, jax.Array]:
    """The layers' states as arrays by name, the layers on one of their axes."""
    parts = zip(*states, strict=True)
    return {name: jnp.stack(part, axis=axis) for name, part in zip(_NAMES, parts, strict=False)}


def _by_layer(arrays: Any, *, axis: int) -> tuple[State, ...]:
    """Inverse of `_by_name`."""
    parts = [jnp.moveaxis(arrays[name], axis, 0) for name in _NAMES if name in arrays]
    return tuple(zip(*parts, strict=True))
