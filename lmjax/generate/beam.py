"""Beam search: the likeliest continuations that a search of bounded width finds.

K beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.core import EncoderDecoder, Variables
from lmjax.errors import UserError
from lmjax.generate.decode import Decoding, as_weights, check_prompt, grow, is_full
from lmjax.generate.sample import check_run
from lmjax.generate.source import check_source
from lmjax.generate.weights import Weights

LARGEST_WIDTH = 1024  # beams; a cache of its own for each


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A continuation that a search found.

    Args:
      tokens: its tokens, without the one that ends it.
      score: the sum of their log-probabilities in nats, the end's included, divided by their number
        to the power of the length penalty.
    """

    tokens: tuple[int, ...]
    score: float


class BeamSearch:
    """Beam search with one model; what it compiled serves every later prompt of the same width.

    Source: the search of Wu et al., arXiv:1609.08144, section 7, as `transformers` has it with
    `early_stopping="never"`: at each step the 2 K likeliest continuations of K beams; those among
    the first K that end are kept, the first K that do not end go on. It stops when none that goes
    on can become better than the K kept. Departure from section 7: a score is divided by
    length ** length_penalty, and there is no coverage penalty.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self._first = jax.jit(self._first_step, static_argnames=("length", "width", "ends"))
        self._next = jax.jit(self._next_step, static_argnames="ends", donate_argnames="cache")

    def search(
        self,
        variables: Variables | Weights,
        prompt: Sequence[int] | np.ndarray,
        *,
        num_beams: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        end_ids: Collection[int] = (),
        ended: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[Continuation]:
        """Up to `num_beams` continuations, best first, each ended by an end or `max_tokens`.

        Args:
          length_penalty: above 0 favours long texts, below 0 short ones; 0 compares sums.
          end_ids: tokens that end a text; of n of them (1 + n) K continuations are looked at.
          ended: whether tokens end a text in another way (a stop string, say).

        Raises:
          UserError: for numbers out of range, an empty prompt, or one that with `max_tokens` more
            is longer than the model's context.
        """
        prompt = [int(token) for token in np.asarray(prompt).reshape(-1)]
        self._check(prompt, num_beams, max_tokens, length_penalty)
        K = num_beams
        if max_tokens == 0:
            return [Continuation(tokens=(), score=0.0)]
        tokens_1T, _ = self.decoding.padded([prompt], 1)
        size = self.decoding.room(tokens_1T, len(prompt))
        weights, ends = as_weights(variables), max(len(end_ids), 1)
        candidates, cache = self._first(
            weights.stacked, tokens_1T, jnp.int32(len(prompt)), length=size, width=K, ends=ends
        )
        held = self.decoding.begun(len(prompt))
        texts: list[tuple[int, ...]] = [()] * K
        kept: list[Continuation] = []
        for length in range(1, max_tokens + 1):
            open_beams: list[tuple[tuple[int, ...], float, int]] = []
            found = zip(*(np.asarray(x).tolist() for x in candidates), strict=True)
            for rank, (total, parent, token) in enumerate(found):
                if total == -np.inf:
                    continue
                text = (*texts[parent], token)
                over = token in end_ids or (ended is not None and ended(text))
                if not over:
                    open_beams.append((text, total, parent))
                if (over or length == max_tokens) and rank < K:
                    tokens = text[:-1] if token in end_ids else text
                    kept.append(Continuation(tokens=tokens, score=total / length**length_penalty))
            kept = sorted(kept, key=lambda one: -one.score)[:K]
            open_beams = open_beams[:K]
            if length == max_tokens or not open_beams:
                break
            farthest = max_tokens if length_penalty > 0 else length
            hope = open_beams[0][1] / farthest**length_penalty
            if len(kept) == K and hope <= kept[-1].score:
                break
            texts = [text for text, _, _ in open_beams]
            totals, parents = (
                np.array(column) for column in list(zip(*open_beams, strict=True))[1:]
            )
            missing = K - len(texts)  # of a vocabulary that has fewer tokens than there are beams
            texts += [()] * missing
            if is_full(cache, held):
                cache = grow(cache, self.decoding.cache_size(held + 1))
            candidates, cache = self._next(
                weights,
                cache,
                np.pad(parents, (0, missing)).astype(np.int32),
                np.array([text[-1] if text else 0 for text in texts], np.int32),
                np.pad(totals, (0, missing), constant_values=-np.inf).astype(np.float32),
                ends=ends,
            )
            held += 1
        return kept

    def _first_step(
        self,
        variables: Variables,
        tokens_1T: jax.Array,
        filled: jax.Array,
        *,
        length: int,
        width: int,
        ends: int,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        logits_1V, cache = self.decoding.read(variables, tokens_1T, filled, None, size=length)
        cache = {
            name: jnp.repeat(x, width, axis=_rows(x)) if x.ndim else x for name, x in cache.items()
        }
        return self._candidates(logits_1V, jnp.zeros((1,)), (1 + ends) * width), cache

    def _next_step(
        self,
        weights: Weights,
        cache: Any,
        parents_K: jax.Array,
        token_K: jax.Array,
        totals_K: jax.Array,
        *,
        ends: int,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        cache = {  # what is of the source is the same for all beams
            name: jnp.take(x, parents_K, axis=_rows(x))
            if x.ndim and not name.startswith("cross_")
            else x
            for name, x in cache.items()
        }
        logits_KV, cache = self.decoding.step(weights, cache, token_K)
        return self._candidates(logits_KV, totals_K, (1 + ends) * len(token_K)), cache

    def _candidates(
        self, logits_KV: jax.Array, totals_K: jax.Array, count: int
    ) -> tuple[jax.Array, ...]:
        """(total log-probability, beam, token) of the likeliest continuations, best first.

        A beam can end in `ends` tokens only, so that among (1 + ends) K of them K go on.
        """
        V = self.decoding.model.vocab_size
        totals_KV = totals_K[:, None] + jax.nn.log_softmax(logits_KV[:, :V], axis=-1)
        best, index = jax.lax.top_k(totals_KV.ravel(), min(count, totals_KV.size))
        return best, index // V, index % V

    def _check(
        self, prompt: Sequence[int], num_beams: int, max_tokens: int, length_penalty: float
    ) -> None:
        check_run(max_tokens=max_tokens, seeds=0)
        check_prompt(prompt, self.decoding.model.vocab_size)
        if not 1 <= num_beams <= LARGEST_WIDTH:
            raise UserError(f"num_beams is {num_beams}: must be from 1 to {LARGEST_WIDTH}.")
        if not -100 <= length_penalty <= 100:
            raise UserError(f"length_penalty is {length_penalty}: must be from -100 to 100.")
        if isinstance(self.decoding.model, EncoderDecoder):
            check_source(self.decoding.model, prompt, max_tokens)
            return
        context = self.decoding.model.max_length
        if len(prompt) + max_tokens > context:
            raise UserError(
                f"{len(prompt)} tokens of prompt and max_tokens {max_tokens} are longer than the "
                f"model's context of {context}, which beam search cannot leave: set max_tokens to "
                f"{max(context - len(prompt), 0)}, or shorten the prompt."
            )


def _rows(x: jax.Array) -> int:
    """Which axis of an array of a cache its rows are: [B], [B, S] or [L, B, ...]."""
    return 0 if x.ndim < 3 else 1
