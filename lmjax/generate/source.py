"""What an encoder-decoder reads before it writes: the prompt, as its source.

B batch, M source length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.core import EncoderDecoder, Variables
from lmjax.errors import UserError
from lmjax.ops.losses import logits


def read_source(
    model: EncoderDecoder,
    variables: Variables,
    source_BM: jax.Array,
    filled: jax.Array,
    start_B: jax.Array | None,
    *,
    size: int,
) -> tuple[jax.Array, Any]:
    """The logits [B, V] of each text's first token, and a cache that holds its start.

    Args:
      filled: sources end at slot `filled - 1`.
      start_B: where they begin; None for all at the first slot.
      size: tokens of a text for which the cache has room.
    """
    B, M = source_BM.shape
    slot_1M = jnp.arange(M)[None]
    start_B1 = (jnp.zeros((B,), jnp.int32) if start_B is None else start_B)[:, None]
    own_BM = (slot_1M >= start_B1) & (slot_1M < filled)
    output = model.apply(
        variables,
        jnp.full((B, 1), model.start_id, jnp.int32),
        source_BM=source_BM,
        source_positions_BM=jnp.maximum(slot_1M - start_B1, 0),
        source_segments_BM=own_BM.astype(jnp.int32),
        cache=model.init_cache(B, size, source_length=M),
    )
    return logits(output.hidden_BTD, output.unembedding)[:, 0], output.cache


def check_source(model: EncoderDecoder, source: Sequence[int], max_tokens: int) -> None:
    """Raises UserError for a source, or a text of `max_tokens`, beyond the model's context."""
    context = model.max_length
    if len(source) > context:
        raise UserError(
            f"the prompt has {len(source)} tokens, and an encoder-decoder reads it whole: the "
            f"model's max_length is {context}. Shorten the prompt."
        )
    if max_tokens > context:
        raise UserError(
            f"max_tokens is {max_tokens}, and the texts of an encoder-decoder end within its "
            f"max_length: set it to at most {context}."
        )
