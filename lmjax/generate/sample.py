"""From logits to the next token.

B batch, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError

LARGEST = 2**31 - 1  # what int32 holds
# The likeliest tokens, found without sorting all: at 50,257 tokens 0.2 ms a row instead of 11.
CANDIDATES = 256


class Settings(TypedDict, total=False):
    """What `Sampling` takes, as keywords of other functions."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits; steps apply in this order, as in `transformers`.

    Args:
      repetition_penalty: logits of tokens that the row holds already are divided by it where they
        are positive and multiplied where negative; 1 for none. Keskar et al., arXiv:1909.05858,
        section 4.1, with the multiplication of negative logits that its code adds.
      temperature: logits are divided by it; 0 takes the likeliest token and looks no further.
      top_k: only so many of the likeliest tokens are drawn from; 0 for all.
      top_p: only the likeliest tokens that together reach this probability, the one that reaches
        it included; 1 for all. Holtzman et al., arXiv:1904.09751, section 3.1.
      min_p: only tokens of at least this share of the likeliest one's probability; 0 for all.
        Nguyen et al., arXiv:2407.01082, section 3.

    Raises:
      UserError: for numbers that nothing can be drawn with.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        for name, value, allowed, fits in (
            ("temperature", self.temperature, "0 or more", 0 <= self.temperature < math.inf),
            ("top_k", self.top_k, f"0 (all) to {LARGEST}", 0 <= self.top_k <= LARGEST),
            ("top_p", self.top_p, "above 0, at most 1 (all)", 0 < self.top_p <= 1),
            ("min_p", self.min_p, "0 (all) to 1", 0 <= self.min_p <= 1),
            (
                "repetition_penalty",
                self.repetition_penalty,
                "above 0 (1 for none)",
                0 < self.repetition_penalty < math.inf,
            ),
        ):
            if not fits:
                raise UserError(f"{name} is {value}: must be {allowed}.")

    def arrays(self) -> dict[str, Any]:
        """The numbers as arrays, so that other values compile nothing."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "min_p": np.float32(self.min_p),
            "repetition_penalty": np.float32(self.repetition_penalty),
        }


def check_run(*, max_tokens: int, seeds: int | np.ndarray) -> None:
    """Raises UserError for a number of tokens or seeds that cannot be."""
    if not 0 <= max_tokens <= LARGEST:
        raise UserError(f"max_tokens is {max_tokens}: must be from 0 to {LARGEST}.")
    for seed in np.atleast_1d(np.asarray(seeds, object)):
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}: must be from 0 to 2**32 - 1.")


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits with `repetition_penalty` (see `Sampling`) on the tokens that a row has seen."""
    factor_BV = jnp.where(logits_BV > 0, 1 / penalty, penalty)
    return jnp.where(seen_BV, logits_BV * factor_BV, logits_BV)


def sample(logits_BV: jax.Array, keys_B: jax.Array, settings: Mapping[str, jax.Array]) -> jax.Array:
    """Draws a token a row, int32 [B], as `Sampling` (of which `settings` are the arrays) says.

    The repetition penalty is not applied here. A row's draw depends on its own logits and key
    alone: the largest of logit / temperature plus Gumbel noise that is a function of (key, token),
    which draws from their softmax (Maddison et al., arXiv:1411.0030, section 2). So it is the
    same over few candidates as over all tokens.
    """

    def draw() -> jax.Array:
        scaled_BV = logits_BV / jnp.maximum(settings["temperature"], 1e-6)
        V = scaled_BV.shape[-1]
        # Without barriers XLA:CPU sorts all tokens: it knows a top_k by how it is used. One barrier
        # for both ends the process where the logits are split over devices.
        top_BC, ids_BC = map(
            jax.lax.optimization_barrier, jax.lax.top_k(scaled_BV, min(CANDIDATES, V))
        )
        kept_BC, enough = _kept(top_BC, scaled_BV, settings)
        return jax.lax.cond(
            enough,
            lambda: _pick(jnp.where(kept_BC, top_BC, -jnp.inf), ids_BC, keys_B),
            lambda: _pick(
                filtered(scaled_BV, settings),
                jnp.broadcast_to(jnp.arange(V), scaled_BV.shape),
                keys_B,
            ),
        )

    def greedy() -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    return jax.lax.cond(settings["temperature"] > 0, draw, greedy)


def filtered(scaled_BV: jax.Array, settings: Mapping[str, jax.Array]) -> jax.Array:
    """Logits that were divided by the temperature, -inf where top_k, top_p, min_p forbid a token.

    Of tokens that tie with the last allowed one, all are allowed.
    """

    def sorted_cut() -> jax.Array:
        sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
        kept_BV, _ = _kept(sorted_BV, scaled_BV, settings)
        return jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)

    needs_order = (settings["top_k"] > 0) | (settings["top_p"] < 1)
    top_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
    cut_B1 = jax.lax.cond(needs_order, sorted_cut, lambda: top_B1 + jnp.log(settings["min_p"]))
    return jnp.where(scaled_BV >= cut_B1, scaled_BV, -jnp.inf)


def _kept(
    sorted_BC: jax.Array, scaled_BV: jax.Array, settings: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(which of the C largest logits, falling, may be drawn; whether no other one may be)."""
    C, V = sorted_BC.shape[-1], scaled_BV.shape[-1]
    top_k = settings["top_k"]
    first_C = (jnp.arange(C) < top_k) | (top_k == 0)
    kth_BC = jnp.where(first_C[None], sorted_BC, -jnp.inf)
    # What top_p measures is the probability among the top_k.
    total_B1 = jax.lax.cond(
        top_k > 0,
        lambda: jax.nn.logsumexp(kth_BC, axis=-1, keepdims=True),
        lambda: jax.nn.logsumexp(scaled_BV, axis=-1, keepdims=True),
    )
    probs_BC = jnp.exp(kth_BC - total_B1)
    likelier_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
    kept_BC = (likelier_BC < settings["top_p"]) | (settings["top_p"] >= 1)
    kept_BC &= sorted_BC >= sorted_BC[:, :1] + jnp.log(settings["min_p"])
    kept_BC = kept_BC & first_C[None] | (jnp.arange(C) == 0)[None]
    complete = jnp.where(top_k > 0, top_k <= C, ~jnp.any(kept_BC[:, -1]))
    return kept_BC, complete | (V == C)


def _pick(x_BC: jax.Array, ids_BC: jax.Array, keys_B: jax.Array) -> jax.Array:
    """The token of the largest logit plus noise, int32 [B]."""
    noise_BC = jax.vmap(jax.vmap(_gumbel, (None, 0)))(keys_B, ids_BC)
    best_B1 = jnp.argmax(x_BC + noise_BC, axis=-1)[:, None]
    return jnp.take_along_axis(ids_BC, best_B1, axis=-1)[:, 0].astype(jnp.int32)


def _gumbel(key: jax.Array, token: jax.Array) -> jax.Array:
    """Standard Gumbel noise, a function of a key and a token."""
    bits = jax.random.key_data(jax.random.fold_in(key, token)).ravel()[0]
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) / 2**23  # 24 bits: exact, never 0 or 1
    return -jnp.log(-jnp.log(uniform))
