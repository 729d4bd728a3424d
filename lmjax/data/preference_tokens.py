"""Preferences as tokens: prompts and completions one after another, and the rows made of them."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.core import Batch
from lmjax.data.encoded import encode_texts
from lmjax.data.preference_rows import Kind, Row, digest, text_of
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError

# By kind, what the names of a row's two texts begin with.
SIDES: Mapping[str, tuple[str, ...]] = {
    "pairs": ("chosen_", "rejected_"),
    "labelled": ("", "kl_"),
}
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Encoded:
    """The rows of a split: a row's prompt and completions lie one after another.

    Args:
      ids: of all texts.
      starts: where each text begins, and the last ends.
      labels: of each row.
      others: for each row the one whose completion stands in for another prompt's.
      counts: of what was refused, left out, cut.
      why: the first of the refusals.
    """

    ids: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    others: np.ndarray
    counts: Mapping[str, int]
    why: str

    def texts(self, row: int) -> list[np.ndarray]:
        """The prompt's ids and each completion's."""
        each = (len(self.starts) - 1) // len(self.labels)
        bounds = self.starts[row * each : (row + 1) * each + 1]
        return [self.ids[a:b] for a, b in itertools.pairwise(bounds)]


def encode(
    rows: Sequence[Row], tokenizer: TextTokenizer, *, length: int, drop: bool = False
) -> Encoded:
    """The tokens of rows of one kind; see `Preferences`."""
    spoken = any(not isinstance(row.prompt, str) for row in rows)
    if spoken:
        if not isinstance(tokenizer, SubwordTokenizer):
            raise UserError(
                "preferences in messages need a tokenizer with a chat template: set "
                "vocabulary=Pretrained(path=...)."
            )
        _ = tokenizer.chat  # raises where there is no template
        if importlib.util.find_spec("jinja2") is None:  # no fault of a row's
            raise UserError("chat templates need jinja2: pip install 'lmjax[chat]'.")
    plain = [row for row in rows if isinstance(row.prompt, str)]
    prompts = encode_texts(tokenizer, [text_of(row.prompt) for row in plain], length=_NO_LIMIT)
    spelled = _spelled(tokenizer, [text_of(side) for row in plain for side in row.completions])
    kept: list[list[np.ndarray]] = []
    of: list[Row] = []
    counts = dict.fromkeys(("refused", "left out", "cut"), 0)
    why, num_plain, num_spelled = "none was refused", 0, 0
    for row in rows:
        if isinstance(row.prompt, str):
            begin, end = prompts.starts[num_plain : num_plain + 2]
            last = num_spelled + len(row.completions)
            texts = [prompts.ids[begin:end], *spelled[num_spelled:last]]
            num_plain, num_spelled = num_plain + 1, last
        else:
            try:
                texts = _conversation(tokenizer, row)
            except UserError as error:
                why = f"{row.name}: {error}" if not counts["refused"] else why
                counts["refused"] += 1
                continue
        longest = max(map(len, texts[1:]))
        over = len(texts[0]) + longest > length + 1
        if longest > length or (over and drop):
            counts["left out"] += 1
            continue
        counts["cut"] += over
        kept.append(texts)
        of.append(row)
    flat = [text for texts in kept for text in texts]
    return Encoded(
        ids=np.concatenate([np.zeros(0, np.int32), *flat]).astype(np.int32),
        starts=np.cumsum([0] + [len(text) for text in flat]),
        labels=np.array([row.label for row in of], np.int32),
        others=_others([digest(row.prompt) for row in of]),
        counts=counts,
        why=why,
    )


def _spelled(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Completions as tokens, each with the document's end."""
    if isinstance(tokenizer, SubwordTokenizer):
        ids = list(tokenizer.encode_batch(texts))
    else:
        ids = [tokenizer.encode(text) for text in texts]
    return [np.append(x, tokenizer.end_id) for x in ids]


def _conversation(tokenizer: Any, row: Row) -> list[np.ndarray]:
    """The prompt's tokens and each completion's, which begin where the two depart first."""
    prompt = list(row.prompt)
    before = tokenizer.encode_chat(prompt, add_generation_prompt=True).ids
    whole = [tokenizer.encode_chat([*prompt, *side]).ids for side in row.completions]
    shared = len(before)
    for ids in whole:
        size = min(shared, len(ids))
        differs = np.flatnonzero(before[:size] != ids[:size])
        shared = int(differs[0]) if len(differs) else size
    if not shared or any(len(ids) == shared for ids in whole):
        raise UserError("the chat template writes no prompt, or nothing after it.")
    return [before[:shared], *(ids[shared:] for ids in whole)]


def _others(prompts: Sequence[bytes]) -> np.ndarray:
    """For each row of the ring the nearest one before it that has another prompt, if any has."""
    num_rows = len(prompts)
    found = (np.arange(num_rows) - 1) % max(num_rows, 1)
    starts = [row for row in range(num_rows) if prompts[row] != prompts[row - 1]]
    if starts:
        for step in range(num_rows):
            row = (starts[0] + step) % num_rows
            if prompts[row] == prompts[row - 1]:
                found[row] = found[row - 1]
    return found


@dataclass(frozen=True)
class Examples:
    """The rows of a split, by number."""

    encoded: Encoded
    kind: Kind
    length: int

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.encoded.labels)

    def rows(self, examples: Sequence[int]) -> Batch:
        """These rows, stacked."""
        chosen = list(examples)
        sides: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
        for row in chosen:
            prompt, *completions = self.encoded.texts(row)
            if self.kind == "labelled":
                other = self.encoded.texts(int(self.encoded.others[row]))[1]
                rooms = [len(completions[0]), len(other)]
                completions.append(other)
            else:
                rooms = [max(map(len, completions))] * 2
            for side, completion, taken in zip(sides, completions, rooms, strict=True):
                side.append((prompt[-(self.length + 1 - taken) :], completion))
        batch: dict[str, np.ndarray] = {}
        for prefix, texts in zip(SIDES[self.kind], sides, strict=True):
            batch |= {f"{prefix}{part}": x for part, x in _padded(texts, self.length).items()}
        if self.kind == "labelled":
            batch["labels"] = self.encoded.labels[chosen]
        return batch


def _padded(texts: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    shape = len(texts), length
    found = {part: np.zeros(shape, np.int32) for part in ("tokens", "targets", "segments")}
    found["weights"] = np.zeros(shape, np.float32)
    for place, (prompt, completion) in enumerate(texts):
        text = np.concatenate([prompt, completion])
        size = len(text) - 1
        found["tokens"][place, :size] = text[:-1]
        found["targets"][place, :size] = text[1:]
        found["segments"][place, :size] = 1
        found["weights"][place, len(prompt) - 1 : size] = 1
    return found
