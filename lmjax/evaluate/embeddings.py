"""Texts as vectors: the mean of an encoder's hidden states, as sentence-transformers makes them.

N texts, B batch, T length, D embed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import build, from_dict
from lmjax.core import Encoder, Variables
from lmjax.data.tokenizer import TextTokenizer, tokenizer_from_json
from lmjax.engine.checkpoint import Checkpoints
from lmjax.errors import UserError

SHORTEST = 16  # tokens of the first bucket of lengths


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """An encoder with its parameters and its tokenizer."""

    model: Encoder
    variables: Variables
    tokenizer: TextTokenizer

    def embed(
        self, texts: Sequence[str], *, max_length: int | None = None, batch_size: int = 32
    ) -> np.ndarray:
        """The vectors of texts, float32 [N, D]; see `embed`."""
        return embed(
            self.model,
            self.variables,
            self.tokenizer,
            texts,
            max_length=max_length,
            batch_size=batch_size,
        )


def load(workdir: str | Path, *, step: int | None = None) -> Embedder:
    """Reads the newest checkpoint (or that of `step`) of an encoder that was imported or trained.

    Raises UserError where the folder holds no such run.
    """
    checkpoints = Checkpoints(Path(workdir) / "checkpoints")
    _, variables, about = checkpoints.restore_for_inference(step)
    checkpoints.close()
    node: Any = about.get("config")
    for name in ("task", "model"):
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"{workdir} has no task.model: it is no run of an encoder.")
    model = build(from_dict(node))
    if not hasattr(model, "apply") or hasattr(model, "init_cache"):
        raise UserError(f"task.model of {workdir} is a {type(model).__name__}, and no encoder.")
    return Embedder(
        model=model,
        variables=jax.device_put(variables),
        tokenizer=tokenizer_from_json(about["tokenizer"]),
    )


def embed(
    model: Encoder,
    variables: Variables,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """The mean over a text's tokens of the last hidden states, of length 1: float32 [N, D].

    Source: Reimers & Gurevych, "Sentence-BERT", arXiv:1908.10084, section 3 (MEAN). The special
    tokens that the tokenizer adds ([CLS], [SEP]) are tokens as others. Texts of like lengths run
    together, padded to a power of two; each (rows, length) is compiled once.

    Args:
      max_length: tokens of a text, special ones among them, beyond which it is cut, its last token
        kept; what the model reads where not given.
      batch_size: at most so many texts at a time.

    Raises:
      UserError: for no texts, a text without tokens, a vocabulary larger than the model's, and a
        max_length that the model does not read.
    """
    longest = model.max_length if max_length is None else max_length
    if not 2 <= longest <= model.max_length or batch_size < 1:
        raise UserError(
            f"max_length is {max_length} and batch_size {batch_size}: the model reads 2 to "
            f"{model.max_length} tokens, of at least 1 text."
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, and the model only "
            f"{model.vocab_size}: it belongs to another model."
        )
    if not texts:
        raise UserError("there are no texts: give at least one.")
    rows = [np.asarray(tokenizer.encode_prompt(text), np.int32) for text in texts]
    if empty := [n for n, row in enumerate(rows) if not len(row)]:
        raise UserError(f"text {empty[0]}, {texts[empty[0]]!r}, has no tokens: leave it out.")
    rows = [r if len(r) <= longest else np.append(r[: longest - 1], r[-1]) for r in rows]
    found: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        T = min(model.max_length, _bucket(max(SHORTEST, len(rows[chosen[-1]]))))
        tokens_BT = np.zeros((min(batch_size, _bucket(len(chosen))), T), np.int32)
        lengths_B = np.ones(len(tokens_BT), np.int32)
        for b, n in enumerate(chosen):
            tokens_BT[b, : len(rows[n])] = rows[n]
            lengths_B[b] = len(rows[n])
        vectors_BD = _vectors(model, variables, tokens_BT, lengths_B)
        for n, vector_D in zip(chosen, np.asarray(vectors_BD), strict=False):  # rows of padding
            found[n] = vector_D
    return np.stack(found)


@functools.partial(jax.jit, static_argnums=0)
def _vectors(
    model: Encoder, variables: Variables, tokens_BT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """The vectors of rows of which the first tokens, so many as `lengths_B` says, are a text."""
    real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    # What pads a row is a segment of its own, which no token of the text sees.
    output = model.apply(variables, tokens_BT, segments_BT=real_BT.astype(jnp.int32))
    hidden_BTD = output.hidden_BTD.astype(jnp.float32)
    sum_BD = jnp.sum(jnp.where(real_BT[..., None], hidden_BTD, 0.0), axis=1)
    mean_BD = sum_BD / lengths_B[:, None].astype(jnp.float32)
    return mean_BD / jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)


def _bucket(number: int) -> int:
    """The power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
