"""Single texts as rows of tokens: what stands around each, what is cut, what pads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmjax.core import Batch
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError


@dataclass(frozen=True)
class Texts:
    """Tokens of texts one after another: ids [tokens], starts [texts + 1], how many were cut."""

    ids: np.ndarray
    starts: np.ndarray
    num_cut: int


def encode_texts(tokenizer: TextTokenizer, texts: Sequence[str], *, length: int) -> Texts:
    """The tokens of each text between what the tokenizer puts around one, at most `length`.

    A special token that is spelled out in a text is spelled, never taken for control. A longer
    text loses its end, and what stands around it stays.

    Raises:
      UserError: where `length` has no room for a token of text, or the tokenizer cannot spell one.
    """
    before, after = _around(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise UserError(
            f"length is {length}, and {len(before) + len(after)} tokens stand around each text: "
            "give more."
        )
    if isinstance(tokenizer, SubwordTokenizer):
        spelled = tokenizer.encode_batch(texts)
    else:
        spelled = [tokenizer.encode(text) for text in texts]
    rows = [np.concatenate([before, ids[:room], after]) for ids in spelled]
    return Texts(
        ids=np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32),
        starts=np.cumsum([0] + [len(row) for row in rows]),
        num_cut=sum(len(ids) > room for ids in spelled),
    )


def pad_rows(ids: np.ndarray, starts: np.ndarray, rows: Sequence[int], length: int) -> Batch:
    """`tokens` and `segments` [rows, length] of some of the texts."""
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(tokens)
    for place, row in enumerate(rows):
        held = ids[starts[row] : starts[row + 1]]
        tokens[place, : len(held)] = held
        segments[place, : len(held)] = 1
    return {"tokens": tokens, "segments": segments}


def _around(tokenizer: TextTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """What the tokenizer puts before and after a text."""
    if not isinstance(tokenizer, SubwordTokenizer):
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    text = "a"
    bare, whole = tokenizer.encode(text), tokenizer.encode_prompt(text)
    for start in range(len(whole) - len(bare) + 1):
        if np.array_equal(whole[start : start + len(bare)], bare):
            return whole[:start], whole[start + len(bare) :]
    raise UserError("the tokenizer reads a text otherwise in a prompt: lmjax cannot tell its ends.")
