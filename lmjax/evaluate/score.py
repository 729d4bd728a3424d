"""Log-probabilities of given tokens, in batches that are compiled once per bucket of lengths.

B batch, T length, K scored tokens of a row, C of them at a time, D embed, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import sharding
from lmjax.core import Decoder, Variables
from lmjax.engine.program import COMPILER_OPTIONS
from lmjax.errors import UserError
from lmjax.ops.losses import logits
from lmjax.sharding import Layout

SMALLEST = 32  # the first bucket of lengths
FEW = 16  # so many scored tokens of a row, or all of them, are compiled for
LOGITS_BYTES = 2**27  # logits that are held at once


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens, int32 [n], of which the last `scored` are scored, each given all before it."""

    tokens: np.ndarray
    scored: int

    def __post_init__(self) -> None:
        assert 0 < self.scored < len(self.tokens)


class Scored(NamedTuple):
    """Log-probabilities in nats, float32 [scored], and which tokens are the likeliest ones, bool.

    Both are read from one array of logits.
    """

    logprobs: np.ndarray
    likeliest: np.ndarray


@dataclass
class Row:
    """What the model reads at once: spans (by number) that differ in their last token alone."""

    inputs: np.ndarray
    spans: list[int]
    slots: int


def bucket(length: int, longest: int) -> int:
    """The length that so many tokens are padded to: 32, 48, 64, 96, ... and at most `longest`."""
    size = SMALLEST
    while size < length:
        size = size * 4 // 3 if size & (size - 1) else size * 3 // 2
    return min(size, longest)


def rows_of(spans: Sequence[Span], batch_size: int) -> Iterator[list[Row]]:
    """Batches of at most `batch_size` rows, the longest first, that hold every span once.

    Spans with the same inputs, such as one-letter answers to one question, share a row.
    """
    rows: list[Row] = []
    shared: dict[bytes, Row] = {}
    for number, span in enumerate(spans):
        inputs = span.tokens[:-1]
        key = inputs.tobytes() if span.scored <= FEW else b""
        row = shared.get(key) if key else None
        if row is None or row.slots + span.scored > FEW:
            row = Row(inputs, [], 0)
            rows.append(row)
            if key:
                shared[key] = row
        row.spans.append(number)
        row.slots += span.scored
    rows.sort(key=lambda row: (row.slots <= FEW, -len(row.inputs)))
    batch: list[Row] = []
    for row in rows:
        if len(batch) == batch_size or (batch and (batch[0].slots > FEW) != (row.slots > FEW)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class Scorer:
    """Scores spans with one model; what it compiled serves every later call.

    Rows of a batch are padded on the right, which no earlier token sees, to the length of a bucket,
    and the batch with empty rows, so that few shapes are ever compiled. (Experts of a limited
    capacity are the exception: padding takes places there. Use `routing="dropless"`.) Over several
    devices each takes its share of the rows, with the whole model.

    Args:
      model: the decoder.
      variables: its parameters.
      batch_size: rows read together; over several devices the next multiple of their number.
      devices: by default all.
    """

    def __init__(
        self,
        model: Decoder,
        variables: Variables,
        *,
        batch_size: int = 8,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: must be at least 1.")
        self.model = model
        self._layout = Layout(data=-1)
        self._mesh = self._layout.mesh(devices)
        ways = sharding.batch_ways(self._mesh)
        self.rows = -(-batch_size // ways) * ways
        self._put = functools.partial(jax.device_put, device=sharding.batch_sharding(self._mesh))
        if self._mesh.size > 1:
            tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
            made: Any = jax.eval_shape(
                model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens
            )
            places = sharding.shardings_of(made, self._mesh)
            variables = jax.device_put(variables, {name: places[name] for name in variables})
        else:
            variables = jax.device_put(variables, self._mesh.devices.flat[0])
        self._variables = variables
        # Rows of one device, times its vocabulary, times so many tokens is what fits.
        self._at_once = max(1, LOGITS_BYTES // (4 * model.vocab_size * (self.rows // ways)))
        self._run = jax.jit(
            self._score,
            static_argnames="at_once",
            compiler_options=COMPILER_OPTIONS.get(self._mesh.devices.flat[0].platform, {}),
        )

    def score(
        self, spans: Sequence[Span], *, progress: Callable[[int], object] | None = None
    ) -> list[Scored]:
        """Each span's scores, in the order of `spans`.

        Args:
          spans: of at most `model.max_length` tokens and one.
          progress: is told how many spans more are done.

        Raises UserError for a token beyond the model's vocabulary.
        """
        for span in spans:
            assert len(span.tokens) <= self.model.max_length + 1
            if (top := int(span.tokens.max())) >= self.model.vocab_size:
                raise UserError(
                    f"the tokenizer gives token {top}, and the model knows "
                    f"{self.model.vocab_size}: it belongs to another model."
                )
        found: list[Scored | None] = [None] * len(spans)
        waiting: tuple[list[Row], Any] | None = None
        for batch in rows_of(spans, self.rows):
            ahead = batch, self._dispatch(batch, spans)  # before the one before it is read
            if waiting:
                _collect(*waiting, spans, found, progress)
            waiting = ahead
        if waiting:
            _collect(*waiting, spans, found, progress)
        return [scored for scored in found if scored is not None]

    def _dispatch(self, batch: list[Row], spans: Sequence[Span]) -> Any:
        """Starts a batch: (log-probabilities, likeliest), both [B, K]."""
        T = bucket(max(len(row.inputs) for row in batch), self.model.max_length)
        wide = batch[0].slots > FEW
        at_once = min(self._at_once, T if wide else FEW)
        K = -(-(T if wide else FEW) // at_once) * at_once
        tokens_BT = np.zeros((self.rows, T), np.int32)
        index_BK = np.zeros((self.rows, K), np.int32)
        target_BK = np.zeros((self.rows, K), np.int32)
        for b, row in enumerate(batch):
            size, slot = len(row.inputs), 0
            tokens_BT[b, :size] = row.inputs
            for number in row.spans:
                scored, end = spans[number].scored, slot + spans[number].scored
                index_BK[b, slot:end] = np.arange(size - scored, size)
                target_BK[b, slot:end] = spans[number].tokens[-scored:]
                slot = end
        arrays = map(self._put, (tokens_BT, index_BK, target_BK))
        return self._run(self._variables, *arrays, at_once=at_once)

    def _score(
        self,
        variables: Variables,
        tokens_BT: jax.Array,
        index_BK: jax.Array,
        target_BK: jax.Array,
        *,
        at_once: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Of the tokens `target_BK` after the tokens number `index_BK`, see `Scored`."""
        with sharding.use(self._mesh, self._layout):
            output = self.model.apply(variables, tokens_BT)
            hidden_BKD = jnp.take_along_axis(output.hidden_BTD, index_BK[..., None], axis=1)

            def some(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                hidden_BCD, target_BC = part
                logits_BCV = logits(hidden_BCD, output.unembedding)
                chosen_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
                logprob_BC = chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
                return logprob_BC, jnp.argmax(logits_BCV, axis=-1) == target_BC

            def cut(x: jax.Array) -> jax.Array:
                return jnp.moveaxis(x.reshape(x.shape[0], -1, at_once, *x.shape[2:]), 1, 0)

            parts = jax.lax.map(some, (cut(hidden_BKD), cut(target_BK)))
            logprob_BK, likeliest_BK = (
                jnp.moveaxis(x, 0, 1).reshape(target_BK.shape) for x in parts
            )
            return logprob_BK, likeliest_BK


def _collect(
    batch: list[Row],
    result: Any,
    spans: Sequence[Span],
    found: list[Scored | None],
    progress: Callable[[int], object] | None,
) -> None:
    """Reads a batch and hands each span its part of it."""
    logprob_BK, likeliest_BK = (np.asarray(x) for x in result)
    for b, row in enumerate(batch):
        slot = 0
        for number in row.spans:
            end = slot + spans[number].scored
            found[number] = Scored(logprob_BK[b, slot:end], likeliest_BK[b, slot:end])
            slot = end
    if progress:
        progress(sum(len(row.spans) for row in batch))
