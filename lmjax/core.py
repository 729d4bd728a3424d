"""The types that every layer of lmjax speaks: what adds, what a task returns, what honours what.

Shape legend: B batch, T length, D embed, V vocabulary, S cache length, M source length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# Name -> array whose first axis is the batch; numpy on the host, jax on a device.
Batch = Mapping[str, Any]
# Linen collections: "params" and, where a model has any, mutable state.
Variables = Mapping[str, Any]
Spec = Mapping[str, jax.ShapeDtypeStruct]  # one example, without the batch axis
# The collection of what rows take from a training batch to the next. Its arrays have a row for each
# of the batch's; `Task.init` makes them for one.
CARRY = "carry"


@struct.dataclass
class Mean:
    """A mean as (total, weight), which adds: merging two sets of observations is `+`."""

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> jax.Array:
        """total / weight; NaN for a mean of nothing."""
        return self.total / self.weight

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | None = None) -> Mean:
        """The weighted mean of an array of observations (weights are one where absent)."""
        if weights is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
        return cls(jnp.sum(values * weights), jnp.sum(weights).astype(jnp.float32))


@struct.dataclass
class Output:
    """What a task's loss returns: the loss to descend, what to report, and mutable model state.

    The reported `loss` is the one descended unless `metrics` holds another of that name.
    """

    loss: Mean
    metrics: dict[str, Mean]
    model_state: Any = struct.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The analytic cost of one training example, forward and backward.

    Args:
      unit: what throughput is counted in ("tokens", "images").
      units: how many of them one example holds.
      flop: multiply-adds counted as two, attention counted as computed for a causal mask (half).
      flop_full: the same with attention counted in full, as in PaLM, arXiv:2204.02311, appendix B.
    """

    unit: str
    units: int
    flop: float
    flop_full: float


@runtime_checkable
class Task(Protocol):
    """An objective over one or more networks: pure, ignorant of meshes, optimizers and files."""

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the variables, each parameter boxed with its axes' names (`sharding.param`)."""
        ...

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """Computes the loss of a batch; totals, not means, so that microbatches add."""
        ...

    def check(self, data: Dataset) -> None:
        """Raises UserError where it cannot read that data; called before any device is used."""
        ...

    def work(self, example: Spec) -> Work:
        """What one example costs to train on."""
        ...

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part of the model, as papers count them (no padding)."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """A task that says something of every single row too."""

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Arrays with a row for each of the batch's, named with their shape ("scores_BC")."""
        ...


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


class Tokenizer(Protocol):
    """Text to token ids and back, the same for every vocabulary."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text; raises UserError for what the vocabulary cannot spell."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of any sequence of ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def to_json(self) -> str:
        """All that is needed to make it again; saved with every checkpoint."""
        ...


class Dataset(Protocol):
    """Batches as a pure function of (seed, step): of no host, worker, device or restart.

    `batches(...)` yields the global batches `start`, `start + 1`, ... of which this process reads
    the rows of shard `shard` of `num_shards`, in the order of the global batch.
    """

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; needs no data."""
        ...

    def check(self) -> None:
        """Opens the data; raises UserError where it is missing, malformed or too short."""
        ...

    @property
    def fitted(self) -> Mapping[str, str]:
        """What was learned of the training data and belongs to the weights: JSON by its name.

        {"tokenizer": ...} of text, {"columns": ...} of a table; kept with every checkpoint.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Names what batches are made of: another one where any batch would be another."""
        ...

    def batches(
        self, *, batch_size: int, seed: int, shard: int = 0, num_shards: int = 1, start: int = 0
    ) -> Iterator[Batch]:
        """The endless sequence of batches from `start` on."""
        ...

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """Every example once, in order; rows of weight 0 complete the last batch."""
        ...

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often `num_examples` drawn examples have gone through each source, by its name."""
        ...


class TextDataset(Dataset, Protocol):
    """Batches of tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens; may have to be trained on the data first."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many token ids there are; needs no data where the tokenizer's settings say it."""
        ...


class LabelledDataset(Dataset, Protocol):
    """Batches of examples with `labels`: an int32 [] each, or a float32 [C] of zeros and ones.

    Each has `weights` too, a float32 []: 0 for a row that only completes a batch.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels, in the order of their numbers."""
        ...


class Evaluator(Protocol):
    """Measures the current parameters now and then; numbers are metrics, strings samples."""

    def check(self, task: Task, data: Dataset, *, ways: int) -> None:
        """Raises UserError where it cannot run on this task, trained on that data.

        The rows of its batches will be split into `ways` parts.
        """
        ...

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """Evaluates; may use the devices."""
        ...


class Session(Protocol):
    """What the engine hands to an evaluator."""

    task: Task
    data: Dataset
    seed: int

    def variables(self) -> Variables:
        """The current variables, with the averaged parameters where the optimizer keeps them."""
        ...

    @property
    def shards(self) -> tuple[int, int]:
        """(shard, num_shards) of a global batch that this process reads."""
        ...

    def eval_step(self, batch: Batch) -> dict[str, Mean]:
        """Metrics (the loss among them) of a global batch, of which this process gives its rows.

        Compiled once per shape.
        """
        ...

    def predict(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """What the task says of each row of a global batch, whole, on every process.

        Of a batch this process gives its rows. Compiled once per shape; raises UserError where the
        task is none that `Predicts`.
        """
        ...

    def keep(self, name: str, content: bytes) -> None:
        """Keeps a file of this name in the run's folder, in the place of an older one."""
        ...
