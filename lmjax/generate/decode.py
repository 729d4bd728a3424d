"""Cached decoding of one prompt or many, compiled once per bucket of lengths and rows.

B batch, T length, S cache length, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.core import Decoder, EncoderDecoder, Variables
from lmjax.errors import UserError
from lmjax.generate.sample import Sampling, Settings, check_run, penalised, sample
from lmjax.generate.source import check_source, read_source
from lmjax.generate.weights import Weights, together, unrolled
from lmjax.ops.losses import logits

SMALLEST_PROMPT = 32
SMALLEST_CACHE = 128


class Decoding:
    """Decodes with one model; what it compiled serves every later prompt.

    A cache has the length of its bucket (128, 256, ... up to the model's longest context) and
    moves to the next one when it is full, so that a short text never pays for a long context. When
    the context itself is full, its later half is read again as a new prompt. Prompts of unequal
    lengths end at the same slot of the cache: what fills a shorter one up at its left is of another
    segment, and positions count from the row's own first token.

    An encoder-decoder reads the prompt as its source; the text begins at its `start_id`, and cannot
    leave the model's context.

    Args:
      smallest_cache: the first bucket.
    """

    def __init__(
        self, model: Decoder | EncoderDecoder, *, smallest_cache: int = SMALLEST_CACHE
    ) -> None:
        self.model = model
        self.reads_source = isinstance(model, EncoderDecoder)
        self.smallest_cache = smallest_cache
        self._read = jax.jit(self.read, static_argnames="size")
        self._step = jax.jit(self.step, donate_argnames="cache")
        # Apart from the model: compiled for a number of rows once, whatever the cache's length is.
        self._draw = jax.jit(self._draw_step, donate_argnames="seen_BV")

    def tokens(
        self,
        variables: Variables | Weights,
        prompt: Sequence[int] | np.ndarray,
        *,
        max_tokens: int,
        seed: int = 0,
        end_ids: Collection[int] = (),
        **settings: Unpack[Settings],
    ) -> Iterator[int]:
        """Yields up to `max_tokens` tokens after the prompt, or until one of `end_ids`.

        Token i is drawn with a key that is a function of (seed, i), as `Sampling` says. On a CPU
        `Weights` with layers apart take half the time a token. Raises
        UserError for an empty prompt, a token beyond the vocabulary, or settings out of range.
        """
        for _, token in self.batch(
            variables, [prompt], max_tokens=max_tokens, seeds=[seed], end_ids=end_ids, **settings
        ):
            yield token

    def batch(
        self,
        variables: Variables | Weights,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_tokens: int,
        seeds: Sequence[int],
        end_ids: Collection[int] = (),
        done: set[int] | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[tuple[int, int]]:
        """Yields (row, token) as they come: each row's text as `tokens` would give it alone.

        It is the same but for rounding: products of other shapes add in another order.

        Args:
          done: rows that want no more; the caller may add to it meanwhile.
        """
        histories = [np.asarray(prompt, np.int32).reshape(-1).tolist() for prompt in prompts]
        check_run(max_tokens=max_tokens, seeds=np.asarray(seeds, object))
        how = Sampling(**settings).arrays()
        for history in histories:
            check_prompt(history, self.model.vocab_size)
        done = set() if done is None else done
        weights = as_weights(variables)
        context = self.model.max_length
        if isinstance(self.model, EncoderDecoder):
            for history in histories:
                check_source(self.model, history, max_tokens)
            views, histories = histories, [[self.model.start_id] for _ in histories]
        else:
            views = [history[-context:] for history in histories]
        rows = self.rows(len(prompts))
        keys = _keys(np.pad(np.asarray(seeds, np.uint32), (0, rows - len(seeds))))
        if not prompts or max_tokens == 0:
            return
        logits_BV, cache, seen_BV, held = self._start(weights, views, histories, rows, done)
        token_B, seen_BV = self._draw(logits_BV, seen_BV, keys, how, np.int32(0))
        for index in range(1, max_tokens + 1):
            current_B, ahead = token_B, index < max_tokens and held < context
            if ahead:  # the device goes on while this token is read
                if is_full(cache, held):
                    cache = grow(cache, self.cache_size(held + 1))
                logits_BV, cache = self._step(weights, cache, token_B)
                token_B, seen_BV = self._draw(logits_BV, seen_BV, keys, how, np.int32(index))
                held += 1
            values = np.asarray(current_B).tolist()
            for row, history in enumerate(histories):
                if row in done:
                    continue
                if values[row] in end_ids:
                    done.add(row)
                    continue
                history.append(values[row])
                views[row].append(values[row])
                yield row, values[row]
            if len(done) == len(prompts):
                return
            if not ahead and index < max_tokens:
                half = max(context // 2, 1)
                views = [view[-half:] if len(view) > context else view for view in views]
                logits_BV, cache, seen_BV, held = self._start(weights, views, histories, rows, done)
                token_B, seen_BV = self._draw(logits_BV, seen_BV, keys, how, np.int32(index))

    def read(
        self,
        variables: Variables,
        tokens_BT: jax.Array,
        filled: jax.Array,
        start_B: jax.Array | None,
        *,
        size: int,
    ) -> tuple[jax.Array, Any]:
        """The logits [B, V] after slot `filled - 1`, and a cache of `size` that holds the tokens.

        Row b begins at slot start_B[b]; None for rows that all begin at the first. Of sources it is
        the logits of the text's first token, and the cache holds its start.
        """
        if isinstance(self.model, EncoderDecoder):
            return read_source(self.model, variables, tokens_BT, filled, start_B, size=size)
        B, T = tokens_BT.shape
        cache, positions_BT = self.model.init_cache(B, size), None
        if start_B is not None:
            own_BS = jnp.arange(size)[None] >= start_B[:, None]
            cache = {**cache, "segments": own_BS.astype(jnp.int32), "start": start_B}
            positions_BT = jnp.maximum(jnp.arange(T)[None] - start_B[:, None], 0)
        if "end" in cache:  # a state, which padding would change
            cache = {**cache, "end": filled}
        output = self.model.apply(variables, tokens_BT, positions_BT=positions_BT, cache=cache)
        last_B1D = jax.lax.dynamic_slice_in_dim(output.hidden_BTD, filled - 1, 1, axis=1)
        # What padding left in the cache lies behind `filled`: unseen, overwritten token by token.
        return logits(last_B1D, output.unembedding)[:, 0], {**output.cache, "length": filled}

    def step(self, weights: Weights, cache: Any, token_B: jax.Array) -> tuple[jax.Array, Any]:
        """The logits [B, V] after one more token a row, and the cache with it."""
        positions_B1 = None
        if "start" in cache:
            positions_B1 = (cache["length"] - cache["start"])[:, None]
        model, variables = self.model, weights.stacked
        if weights.apart is not None:
            model, variables = self._unrolled, together(weights.apart)
        output = model.apply(variables, token_B[:, None], positions_BT=positions_B1, cache=cache)
        return logits(output.hidden_BTD, output.unembedding)[:, -1], output.cache

    def cache_size(self, length: int) -> int:
        """The length of the cache that serves `length` tokens."""
        return min(_bucket(length, self.smallest_cache), self.model.max_length)

    def rows(self, count: int) -> int:
        """How many rows a step has for so many prompts."""
        return _bucket(count, 1)

    def begun(self, length: int) -> int:
        """How many slots of a cache a prompt of so many tokens fills: of a source, the start."""
        return 1 if self.reads_source else length

    def room(self, tokens_BT: np.ndarray, length: int) -> int:
        """The length of the first cache for these prompts, which end at slot `length - 1`."""
        if self.reads_source:
            return self.cache_size(1)
        return max(self.cache_size(length), tokens_BT.shape[1])

    def padded(self, tokens: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_BT of a bucket's length, where rows begin): all end at the same slot."""
        longest = max(map(len, tokens))
        length = min(_bucket(longest, SMALLEST_PROMPT), self.model.max_length)
        tokens_BT = np.zeros((rows, length), np.int32)
        start_B = np.full(rows, longest - 1, np.int32)
        for row, history in enumerate(tokens):
            start_B[row] = longest - len(history)
            tokens_BT[row, start_B[row] : longest] = history
        return tokens_BT, start_B

    @functools.cached_property
    def _unrolled(self) -> Decoder | EncoderDecoder:
        return unrolled(self.model)

    def _start(
        self,
        weights: Weights,
        views: list[list[int]],
        histories: list[list[int]],
        rows: int,
        done: set[int],
    ) -> tuple[jax.Array, Any, jax.Array, int]:
        """Reads what rows see of their texts: (logits_BV, cache, seen_BV, slots filled)."""
        open_views = [view[-1:] if row in done else view for row, view in enumerate(views)]
        held = max(map(len, open_views))
        tokens_BT, start_B = self.padded(open_views, rows)
        logits_BV, cache = self._read(
            weights.stacked,
            tokens_BT,
            np.int32(held),
            start_B if rows > 1 else None,
            size=self.room(tokens_BT, held),
        )
        seen_BV = np.zeros((rows, self.model.vocab_size), bool)
        for row, history in enumerate(histories):
            seen_BV[row, history] = True
        return logits_BV, cache, jnp.asarray(seen_BV), self.begun(held)

    def _draw_step(
        self,
        logits_BV: jax.Array,
        seen_BV: jax.Array,
        keys_B: jax.Array,
        how: Mapping[str, Any],
        index: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """(the tokens drawn, what rows have seen with them)."""
        logits_BV = logits_BV[:, : self.model.vocab_size]
        logits_BV = penalised(logits_BV, seen_BV, how["repetition_penalty"])
        token_B = sample(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, index), how)
        return token_B, seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)


def as_weights(variables: Variables | Weights) -> Weights:
    """Variables as they are, or with layers apart."""
    return variables if isinstance(variables, Weights) else Weights(variables)


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Raises UserError for an empty prompt, or a token beyond the vocabulary."""
    if not prompt:
        raise UserError("the prompt is empty: give at least one character to go on from.")
    for token in (max(prompt), min(prompt)):
        if not 0 <= token < vocab_size:
            raise UserError(
                f"the prompt holds token {token}, beyond the vocabulary of {vocab_size}."
            )


def is_full(cache: Mapping[str, Any], held: int) -> bool:
    """Whether a cache of `held` tokens has no slot for one more; a state has no slots."""
    return "key" in cache and held == cache["key"].shape[3]


@functools.partial(jax.jit, static_argnames="length")
def grow(cache: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The same cache with room for `length` tokens."""

    def wider(rows: jax.Array) -> jax.Array:
        if rows.ndim < 2:
            return rows
        if rows.ndim == 2:  # segments_BS: new slots are for tokens of the row's own
            return jnp.pad(rows, ((0, 0), (0, length - rows.shape[1])), constant_values=1)
        room = length - rows.shape[3]  # rows_LBGSK
        return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))

    return {name: x if name.startswith("cross_") else wider(x) for name, x in cache.items()}


def _bucket(size: int, smallest: int) -> int:
    """`smallest`, or what doubling makes of it until it is `size` or more."""
    bucket = smallest
    while bucket < size:
        bucket *= 2
    return bucket


@jax.jit
def _keys(seeds_B: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.key)(seeds_B)
