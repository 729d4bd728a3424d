"""How far a student's distribution of the next token is from a teacher's, from hidden states.

As in `ops.losses`, the logits need never be held whole.
"""

# Shape legend: B batch, T length, D student's embed, E teacher's, V tokens that both know,
# C columns of one of N chunks of the vocabulary, K teacher's likeliest tokens.

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax import sharding
from lmjax.core import Unembedding
from lmjax.ops.losses import logits

# Where a token is none: -inf would give NaN, as -inf - -inf.
_VERY_NEGATIVE = -1e30


def divergence(
    hidden_BTD: jax.Array,
    unembedding: Unembedding,
    teacher_BTE: jax.Array,
    teacher_unembedding: Unembedding,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    vocab_chunk: int = 0,
) -> jax.Array:
    """KL(p || q) of each token in nats, float32 [B, T]: p of the teacher, q of the student.

    p and q are the softmax of logits / temperature over the tokens that both models know (the first
    ones, as many as the smaller vocabulary has). With `top_k` p is that of the teacher's k
    likeliest tokens alone, renormalised to a sum of 1; q stays that of all tokens. No gradient goes
    to the teacher. Hinton et al., arXiv:1503.02531, section 2, multiply by temperature^2, so that
    gradients are of one size whatever the temperature; the caller does that.

    With `vocab_chunk` > 0 about that many logits a token are held of each model, forward or
    backward, at the cost of one more product of each; the sums are online (Milakov & Gimelshein,
    arXiv:1805.02867).

    Args:
      hidden_BTD: the student's, with its `unembedding`.
      teacher_BTE: the teacher's, with its `teacher_unembedding`.
    """
    teacher_BTE, teacher_unembedding = lax.stop_gradient((teacher_BTE, teacher_unembedding))
    size = min(unembedding.vocab_size, teacher_unembedding.vocab_size)
    num_chunks = -(-size // vocab_chunk) if vocab_chunk else 1
    student = _Side(hidden_BTD, unembedding, size, num_chunks, temperature)
    teacher = _Side(teacher_BTE, teacher_unembedding, size, num_chunks, temperature)
    if top_k:
        return _of_likeliest(student, teacher, min(top_k, size))
    return _of_all(student, teacher)


class _Sum(NamedTuple):
    """Sums of exp(x - top), so far: of one, and of something beside it."""

    top_BT: jax.Array
    sum_BT: jax.Array
    beside_BT: jax.Array

    @classmethod
    def empty(cls, like_BTD: jax.Array) -> _Sum:
        zeros_BT = jnp.zeros(like_BTD.shape[:2], jnp.float32)
        return cls(zeros_BT + _VERY_NEGATIVE, zeros_BT, zeros_BT)

    def add(self, x_BTC: jax.Array, beside_BTC: jax.Array | None = None) -> _Sum:
        top_BT = jnp.maximum(self.top_BT, lax.stop_gradient(jnp.max(x_BTC, axis=-1)))
        old_BT = jnp.exp(self.top_BT - top_BT)
        weights_BTC = jnp.exp(x_BTC - top_BT[..., None])
        more = 0.0 if beside_BTC is None else jnp.sum(weights_BTC * beside_BTC, axis=-1)
        return _Sum(
            top_BT,
            self.sum_BT * old_BT + jnp.sum(weights_BTC, axis=-1),
            self.beside_BT * old_BT + more,
        )

    @property
    def log_BT(self) -> jax.Array:
        return jnp.log(self.sum_BT) + self.top_BT


class _Side:
    """One of the two models: its logits, chunk by chunk; chunk n has every N-th token."""

    def __init__(
        self,
        hidden_BTD: jax.Array,
        unembedding: Unembedding,
        size: int,
        num_chunks: int,
        temperature: float,
    ) -> None:
        self.hidden_BTD = sharding.shard(hidden_BTD, "batch", "length", None)
        self.unembedding, self.size = unembedding, size
        self.num_chunks, self.temperature = num_chunks, temperature
        rows = -(-size // num_chunks) * num_chunks
        self.rows_NCD = self._cut(unembedding.weights_VD, rows)
        bias_V = unembedding.bias_V
        self.bias_NC = None if bias_V is None else self._cut(bias_V, rows)

    def _cut(self, x: jax.Array, rows: int) -> jax.Array:
        x = x[:rows]
        x = jnp.pad(x, ((0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(-1, self.num_chunks, *x.shape[1:])

    def scores(self, chunk: Any) -> jax.Array:
        """Logits / temperature of a chunk's tokens, float32 [B, T, C]."""
        rows_CD = lax.dynamic_index_in_dim(self.rows_NCD, chunk, 1, keepdims=False)
        bias_C = None
        if self.bias_NC is not None:
            bias_C = lax.dynamic_index_in_dim(self.bias_NC, chunk, 1, keepdims=False)
        part = Unembedding(
            weights_VD=rows_CD,
            vocab_size=len(rows_CD),
            dtype=self.unembedding.dtype,
            softcap=self.unembedding.softcap,
            bias_V=bias_C,
        )
        found_BTC = logits(self.hidden_BTD, part) / self.temperature
        ids = lax.broadcasted_iota(jnp.int32, found_BTC.shape, 2) * self.num_chunks + chunk
        return jnp.where(ids < self.size, found_BTC, _VERY_NEGATIVE)

    def over_chunks(self, body: Any, start: Any) -> Any:
        """`body(carry, chunk)` for every chunk; its logits are made again for the gradient."""
        if self.num_chunks == 1:
            return body(start, 0)
        step = jax.checkpoint(lambda carry, chunk: (body(carry, chunk), None))
        return lax.scan(step, start, jnp.arange(self.num_chunks))[0]


def _of_all(student: _Side, teacher: _Side) -> jax.Array:
    def body(carry: tuple[_Sum, _Sum], chunk: Any) -> tuple[_Sum, _Sum]:
        of_teacher, of_student = carry
        t_BTC, s_BTC = teacher.scores(chunk), student.scores(chunk)
        return of_teacher.add(t_BTC, t_BTC - s_BTC), of_student.add(s_BTC)

    empty = _Sum.empty(student.hidden_BTD)
    p, q = student.over_chunks(body, (empty, empty))
    found_BT: jax.Array = p.beside_BT / p.sum_BT - p.log_BT + q.log_BT
    return found_BT


def _of_likeliest(student: _Side, teacher: _Side, top_k: int) -> jax.Array:
    shape = (*student.hidden_BTD.shape[:2], top_k)
    # Ids of nothing are beyond the vocabulary: where k is more than a chunk has, none is twice.
    nothing = jnp.full(shape, _VERY_NEGATIVE), jnp.full(shape, student.size, jnp.int32)

    def choose(best: tuple[jax.Array, jax.Array], chunk: Any) -> tuple[jax.Array, jax.Array]:
        scores_BTC = teacher.scores(chunk)
        ids = lax.broadcasted_iota(jnp.int32, scores_BTC.shape, 2) * teacher.num_chunks + chunk
        both = jnp.concatenate([best[0], scores_BTC], -1), jnp.concatenate([best[1], ids], -1)
        top_BTK, at_BTK = lax.top_k(both[0], top_k)
        return top_BTK, jnp.take_along_axis(both[1], at_BTK, axis=-1)

    top_BTK, ids_BTK = lax.stop_gradient(teacher.over_chunks(choose, nothing))
    log_p_BTK = jax.nn.log_softmax(top_BTK)

    def body(carry: tuple[_Sum, jax.Array], chunk: Any) -> tuple[_Sum, jax.Array]:
        of_student, at_BTK = carry
        s_BTC = student.scores(chunk)
        column_BTK = jnp.minimum(ids_BTK // student.num_chunks, s_BTC.shape[-1] - 1)
        here_BTK = jnp.take_along_axis(s_BTC, column_BTK, axis=-1)
        at_BTK = jnp.where(ids_BTK % student.num_chunks == chunk, here_BTK, at_BTK)
        return of_student.add(s_BTC), at_BTK

    start = _Sum.empty(student.hidden_BTD), jnp.zeros(shape, jnp.float32)
    q, at_BTK = student.over_chunks(body, start)
    found_BTK = jnp.exp(log_p_BTK) * (log_p_BTK - at_BTK + q.log_BT[..., None])
    return jnp.sum(found_BTK, axis=-1)
