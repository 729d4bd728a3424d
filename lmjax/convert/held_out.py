"""What becomes of a decoder's predictions, on text that is named."""

# Shape legend: R rows, T length, V vocabulary.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.source import read_documents
from lmjax.errors import UserError
from lmjax.ops.losses import logits

BATCH = 8  # rows at once


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of text: mean nats a token, and the share of tokens that were the likeliest."""

    loss: float
    accuracy: float


def windows_of(text: str, tokenizer: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(windows of a text but for its last tenth, windows of that), each [R, length + 1].

    Args:
      text: see `data.source.read_documents`.

    Raises UserError where a tenth of it is shorter than a window.
    """
    texts = [document.text for document in read_documents(text)]
    ids = np.concatenate([np.asarray(tokenizer.encode(t), np.int32) for t in texts])
    cut = len(ids) - len(ids) // 10
    parts = [x[: len(x) // (length + 1) * (length + 1)] for x in (ids[:cut], ids[cut:])]
    if min(map(len, parts)) == 0:
        raise UserError(
            f"{text} has {len(ids)} tokens: a tenth of them must be more than the length {length}."
        )
    first, last = (x.reshape(-1, length + 1) for x in parts)
    return first, last


def measure(model: Any, params: Any, windows_RT: np.ndarray) -> Measured:
    """How well a decoder predicts each window's tokens but the first."""

    @jax.jit
    def sums(params: Any, rows_RT: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = model.apply({"params": params}, rows_RT[:, :-1])
        logits_RTV = logits(output.hidden_BTD, output.unembedding)
        targets_RT = rows_RT[:, 1:]
        chosen_RT = jnp.take_along_axis(logits_RTV, targets_RT[..., None], axis=-1)[..., 0]
        nats_RT = jax.nn.logsumexp(logits_RTV, axis=-1) - chosen_RT
        return jnp.sum(nats_RT), jnp.sum(jnp.argmax(logits_RTV, axis=-1) == targets_RT)

    count = windows_RT[:, 1:].size
    rows = [windows_RT[at : at + BATCH] for at in range(0, len(windows_RT), BATCH)]
    found = np.sum([np.asarray(sums(params, part), np.float64) for part in rows], axis=0)
    return Measured(loss=found[0] / count, accuracy=found[1] / count)
