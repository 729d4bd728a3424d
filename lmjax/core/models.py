"""What models honour, and what they return.

Shape legend: B batch, T length, D embed, V vocabulary, S cache length, M source length, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import struct

from lmjax.core.data import Dataset
from lmjax.core.values import Batch, Mean, Spec, Variables


@struct.dataclass
class Unembedding:
    """The map from hidden states to logits, kept apart from them so that a loss can go in chunks.

    Shapes: weights_VD, bias_V. Rows from `vocab_size` on are padding: their logits are -inf to
    every reader. With a `softcap` c each logit x, its bias in it, is c tanh(x / c).
    """

    weights_VD: jax.Array
    vocab_size: int = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False, default="float32")
    softcap: float | None = struct.field(pytree_node=False, default=None)
    bias_V: jax.Array | None = None


@struct.dataclass
class DecoderOutput:
    """What a decoder returns: hidden_BTD, the unembedding that makes logits of it, the cache.

    `aux` holds what its layers measure by the way, auxiliary losses among it: totals are sums over
    layers and tokens, so that they add over batches.
    """

    hidden_BTD: jax.Array
    unembedding: Unembedding
    cache: Any = None
    aux: dict[str, Mean] = struct.field(default_factory=dict)


class TextModel(Protocol):
    """What every model of text is, beside what it computes."""

    @property
    def max_length(self) -> int:
        """The longest text that it reads, and the longest that it writes, in tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many token ids the model knows; padding is not counted."""
        ...

    def init(self, rng: jax.Array, tokens_BT: jax.Array) -> Variables:
        """Makes the variables (linen's own method); the tokens stand for a source too."""
        ...

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part, as papers count them: rows that pad the vocabulary are left out."""
        ...


class Decoder(TextModel, Protocol):
    """Any autoregressive language model as a linen module: GPT, Llama, LSTM (cache = carry), ...

    `positions_BT` count from a document's start, `segments_BT` tell documents of a row apart: a
    token sees earlier tokens of its own segment only. With a cache, tokens are appended to what it
    holds. A model that is `stateful` takes its state from a training batch to the next in the
    collection `CARRY`, where zeros are the state before any token.
    """

    def apply(self, variables: Variables, tokens_BT: jax.Array, **arguments: Any) -> DecoderOutput:
        """Calls the module with these variables (linen's own method)."""
        ...

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Any = None,
        train: bool = False,
    ) -> DecoderOutput:
        """Hidden states, the unembedding, and the cache with these tokens appended."""
        ...

    def init_cache(self, batch_size: int, length: int) -> Any:
        """An empty cache for `length` tokens: a tree that `__call__` takes and returns."""
        ...

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass: (causal attention, full attention)."""
        ...


@runtime_checkable
class EncoderDecoder(TextModel, Protocol):
    """Any model that reads a source and writes a target, as a linen module: T5, ...

    A source token sees all of its own segment. A target token sees earlier tokens of its own
    segment, and the source's tokens of that segment: so several pairs are packed into a row. Where
    the targets have no segments they are all of segment 1, and what pads a source is another.

    The first call with a cache is given the source too: the cache then holds what the layers need
    of it. Every later call is one of a `Decoder`: tokens are appended.
    """

    @property
    def start_id(self) -> int:
        """The token before the target's first."""
        ...

    def apply(self, variables: Variables, tokens_BT: jax.Array, **arguments: Any) -> DecoderOutput:
        """Calls the module with these variables (linen's own method)."""
        ...

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
        """Hidden states of the target, the unembedding, and the cache with the target appended."""
        ...

    def encode(
        self,
        source_BM: jax.Array,
        *,
        positions_BM: jax.Array | None = None,
        segments_BM: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """What the encoder makes of the source, [B, M, D]."""
        ...

    def init_cache(self, batch_size: int, length: int, *, source_length: int) -> Any:
        """An empty cache for `length` tokens of targets and `source_length` of sources.

        A tree that `__call__` takes and returns; what holds the source has names in `cross_`.
        """
        ...

    def flop(self, source_length: int, target_length: int) -> tuple[float, float]:
        """FLOP of the forward pass of one pair, logits included: (causal, full attention).

        It is the target's attention to itself that is causal.
        """
        ...


@struct.dataclass
class EncoderOutput:
    """What an encoder returns; None is what the model has no part for.

    Args:
      hidden_BTD: the last layer's hidden states.
      pooled_BD: one vector a row, made of its first token's hidden state.
      predicting_BTD: hidden states of a head that predicts tokens.
      unembedding: makes logits of these.
      aux: as in `DecoderOutput`.
    """

    hidden_BTD: jax.Array
    pooled_BD: jax.Array | None = None
    predicting_BTD: jax.Array | None = None
    unembedding: Unembedding | None = None
    aux: dict[str, Mean] = struct.field(default_factory=dict)


class Encoder(TextModel, Protocol):
    """Any bidirectional model of text as a linen module: BERT, ...

    A token sees all tokens of its own segment, those after it too. So packed documents of a row are
    segments, and what pads a row is one more; `positions_BT` count from a document's start (from
    the row's where not given), `token_types_BT` tell the parts of a pair apart (0 where not given).
    """

    def apply(self, variables: Variables, tokens_BT: jax.Array, **arguments: Any) -> EncoderOutput:
        """Calls the module with these variables (linen's own method)."""
        ...

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        token_types_BT: jax.Array | None = None,
        train: bool = False,
    ) -> EncoderOutput:
        """Hidden states, and what the model's heads make of them."""
        ...

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass, logits included: twice (no attention is causal)."""
        ...


@struct.dataclass
class NetworkOutput:
    """What a network returns: values_BC in float32, class scores or regressed values; and aux.

    `aux` is as in `DecoderOutput`.
    """

    values_BC: jax.Array
    aux: dict[str, Mean] = struct.field(default_factory=dict)


class Network(Protocol):
    """Any linen module from a batch to numbers per example: a classifier, a regression, ...

    It takes its inputs of the batch by their names: `tokens`, `segments` and `positions` of text,
    `features` (float32 [F]) and `categories` (int32 [K]) of a table, `images` (float32 [H, W, C]).
    """

    @property
    def num_outputs(self) -> int:
        """How many classes, or values."""
        ...

    def check(self, data: Dataset) -> None:
        """Raises UserError where it cannot read that data; called before any device is used."""
        ...

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the variables (linen's own method)."""
        ...

    def apply(self, variables: Variables, batch: Batch, **arguments: Any) -> Any:
        """Calls the module with these variables (linen's own method)."""
        ...

    def __call__(self, batch: Batch, *, train: bool = False) -> NetworkOutput:
        """The values of every row."""
        ...

    def flop(self, example: Spec) -> float:
        """FLOP of the forward pass of one example."""
        ...

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part, as papers count them."""
        ...
