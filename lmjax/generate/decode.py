"""Cached decoding, compiled once per bucket of lengths.

B batch, T length, S cache length, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.core import Decoder, Variables
from lmjax.errors import UserError
from lmjax.generate.sample import check_settings, sample
from lmjax.ops.losses import logits

SMALLEST_BUCKET = 32


class Decoding:
    """Decodes with one model; what it compiled serves every later prompt.

    A cache has the length of its bucket (32, 64, ... up to the model's longest context) and moves
    to the next one when it is full, so that a short text never pays for a long context. When the
    context itself is full, its later half is read again as a new prompt.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._prefill = jax.jit(self._prefill_step, static_argnames="length")
        self._next = jax.jit(self._next_step, donate_argnames="cache")

    def tokens(
        self,
        variables: Variables,
        prompt: Sequence[int] | np.ndarray,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        end_id: int | None = None,
    ) -> Iterator[int]:
        """Yields up to `max_tokens` tokens after the prompt, or until `end_id` comes.

        Token i is drawn with a key that is a function of (seed, i). Raises UserError for an empty
        prompt, a token beyond the vocabulary, or settings out of range.
        """
        prompt = np.asarray(prompt, np.int32)
        check_settings(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
        self._check(prompt)
        settings = {"temperature": jnp.float32(temperature), "top_k": jnp.int32(top_k)}
        rng, context = jax.random.key(seed), self.model.max_length
        history = [int(t) for t in prompt[-context:]]
        cache: Any = None
        held = 0
        for index in range(max_tokens):
            key = jax.random.fold_in(rng, index)
            if cache is None or held == context:
                if held == context:
                    history = history[-max(context // 2, 1) :]
                token, cache = self.prefill(variables, history, key, settings)
                held = len(history)
            else:
                if held == cache["key"].shape[2]:
                    cache = grow(cache, self.bucket(held + 1))
                token, cache = self._next(variables, cache, token, key, settings)
                held += 1
            value = int(token[0])
            if value == end_id:
                return
            history.append(value)
            yield value

    def prefill(
        self,
        variables: Variables,
        tokens: Sequence[int],
        key: jax.Array,
        settings: Mapping[str, Any],
    ) -> tuple[jax.Array, Any]:
        """Reads a prompt: (the token drawn after it, a cache that holds it)."""
        padded = np.zeros((1, self.bucket(len(tokens))), np.int32)
        padded[0, : len(tokens)] = tokens
        return self._prefill(
            variables, padded, jnp.int32(len(tokens)), key, settings, length=padded.shape[1]
        )

    def bucket(self, length: int) -> int:
        """The cache length that serves `length` tokens."""
        size = SMALLEST_BUCKET
        while size < length:
            size *= 2
        return min(size, self.model.max_length)

    def _prefill_step(
        self,
        variables: Variables,
        tokens_1T: jax.Array,
        filled: jax.Array,
        key: jax.Array,
        settings: Mapping[str, Any],
        *,
        length: int,
    ) -> tuple[jax.Array, Any]:
        cache = self.model.init_cache(1, length)
        output = self.model.apply(variables, tokens_1T, cache=cache)
        last_1D = jax.lax.dynamic_index_in_dim(output.hidden_BTD, filled - 1, axis=1)
        logits_1V = logits(last_1D, output.unembedding)[:, 0]
        # What padding left in the cache lies behind `filled`: unseen, overwritten token by token.
        return sample(logits_1V, key, **settings), {**output.cache, "length": filled}

    def _next_step(
        self,
        variables: Variables,
        cache: Any,
        token_1: jax.Array,
        key: jax.Array,
        settings: Mapping[str, Any],
    ) -> tuple[jax.Array, Any]:
        output = self.model.apply(variables, token_1[:, None], cache=cache)
        logits_1V = logits(output.hidden_BTD, output.unembedding)[:, -1]
        return sample(logits_1V, key, **settings), output.cache

    def _check(self, prompt: np.ndarray) -> None:
        if prompt.size == 0:
            raise UserError("the prompt is empty: give at least one character to go on from.")
        if prompt.max() >= self.model.vocab_size or prompt.min() < 0:
            raise UserError(
                f"the prompt holds token {prompt.max()}, "
                f"beyond the vocabulary of {self.model.vocab_size}."
            )


@functools.partial(jax.jit, static_argnames="length")
def grow(cache: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The same cache with room for `length` tokens."""

    def wider(rows_LBSGK: jax.Array) -> jax.Array:
        room = length - rows_LBSGK.shape[2]
        return jnp.pad(rows_LBSGK, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0)))

    return {name: wider(x) if x.ndim else x for name, x in cache.items()}
