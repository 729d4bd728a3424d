"""Conversations as rows of tokens, of which the assistant's are to be learned; kept in files."""

# R rows, C conversations, T tokens

from __future__ import annotations

import collections
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmjax.core import Batch
from lmjax.data.cache import seal_folder
from lmjax.data.chat import ChatTemplate, Rendered
from lmjax.data.conversations import ASSISTANT, Conversation
from lmjax.data.packing import best_fit
from lmjax.data.quarantine import Bad, as_jsonl, beginning
from lmjax.data.subword import ChatTokens, SubwordTokenizer
from lmjax.errors import UserError

TooLong = Literal["cut", "drop"]
RowPacking = Literal["fit", "none"]
_MARKS = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Rows:
    """Conversations in rows, in a folder; pickles as the folder's name.

    `ids` and `said` [T] hold the tokens of one conversation after another, in the order of rows,
    and whether the assistant said them; `begins` [C + 1] is where each begins; `first` [R + 1] each
    row's first conversation. A conversation of n tokens takes n - 1 places in its row.
    """

    folder: Path
    length: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopened, not copied, in another process."""
        return Rows, (self.folder, self.length)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Token ids as stored."""
        return np.asarray(np.load(self.folder / "ids.npy", mmap_mode="r"))

    @functools.cached_property
    def said(self) -> np.ndarray:
        """Which of them the assistant said."""
        return np.asarray(np.load(self.folder / "said.npy", mmap_mode="r"))

    @functools.cached_property
    def begins(self) -> np.ndarray:
        """Where each conversation begins, and the last ends."""
        return np.asarray(np.load(self.folder / "begins.npy"))

    @functools.cached_property
    def first(self) -> np.ndarray:
        """Each row's first conversation, and C."""
        return np.asarray(np.load(self.folder / "first.npy"))

    @functools.cached_property
    def counts(self) -> Mapping[str, int]:
        """What became of the conversations."""
        found: dict[str, int] = json.loads((self.folder / "counts.json").read_text())
        return found

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.first) - 1

    def rows(self, examples: Sequence[int]) -> Batch:
        """The examples of these rows, stacked; `Dialogue` says what is in one."""
        shape = len(examples), self.length
        names = ("tokens", "targets", "segments", "positions")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights"] = np.zeros(shape, np.float32)
        for place, row in enumerate(examples):
            column = 0
            for number, item in enumerate(range(*self.first[row : row + 2].tolist()), start=1):
                begin, end = self.begins[item : item + 2].tolist()
                own = np.s_[place, column : column + end - begin - 1]
                batch["tokens"][own] = self.ids[begin : end - 1]
                batch["targets"][own] = self.ids[begin + 1 : end]
                batch["weights"][own] = self.said[begin + 1 : end]
                batch["segments"][own] = number
                batch["positions"][own] = np.arange(end - begin - 1)
                column += end - begin - 1
        return batch


def chat_tokens(tokenizer: SubwordTokenizer, conversation: Conversation) -> ChatTokens:
    """The conversation's ids and which of them are the assistant's, with what ends each message.

    Where the template marks what the assistant says (`{% generation %}`), that is it. Elsewhere it
    is what a message adds to the text: from the end of the messages before it, with the prompt that
    begins an answer, to its own end. The token that ends a message counts in both; blanks behind
    it, which the template writes and no model need say, do not. What follows the assistant's last
    token is left out, as nothing is learned of it.

    Raises UserError where the template refuses the messages, and where it marks nothing and writes
    a message otherwise when others follow, so that its place cannot be told.
    """
    chat = tokenizer.chat
    rendered = chat.render(conversation.messages, tools=conversation.tools)
    if not any(_MARKS.search(text) for _, text in chat.templates):
        rendered = Rendered(rendered.text, _spans(chat, conversation, rendered.text))
    ids, said = tokenizer.encode_rendered(rendered)
    said = _with_ends(tokenizer, ids, said)
    last = int(np.flatnonzero(said)[-1]) + 1 if said.any() else 0
    return ChatTokens(ids[:last], said[:last])


def _spans(
    chat: ChatTemplate, conversation: Conversation, text: str
) -> tuple[tuple[int, int], ...]:
    """(start, end) in the text of what the assistant's messages add to it."""
    messages, spans = conversation.messages, []
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        if index == 0:
            raise UserError("the assistant speaks first, and the template does not mark its words")
        before = chat.render(
            messages[:index], tools=conversation.tools, add_generation_prompt=True
        ).text
        after = chat.render(messages[: index + 1], tools=conversation.tools).text
        if not (text.startswith(before) and text.startswith(after)) or len(after) < len(before):
            raise UserError(
                "the template writes a message otherwise when others follow: put {% generation %} "
                "around what the assistant says in it"
            )
        spans.append((len(before), len(after)))
    return tuple(spans)


def _with_ends(tokenizer: SubwordTokenizer, ids: np.ndarray, said: np.ndarray) -> np.ndarray:
    """With the special token behind each run, and without blanks behind one that a run holds."""
    special = tokenizer.token_bytes()[ids] == 0
    found = said.copy()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], said, [False]]).astype(np.int8)))
    for begin, end in edges.reshape(-1, 2).tolist():
        ends = np.flatnonzero(special[begin:end])
        last = begin + int(ends[-1]) if len(ends) else -1
        if last >= 0 and not tokenizer.decode(ids[last + 1 : end]).strip():
            found[last + 1 : end] = False
        elif end < len(ids) and special[end]:
            found[end] = True
    return found


def write_rows(
    folder: Path,
    conversations: Sequence[Conversation],
    tokenizer: SubwordTokenizer,
    *,
    length: int,
    packing: RowPacking,
    too_long: TooLong,
) -> None:
    """Writes the conversations as `Rows`, several to a row where the packing is "fit".

    Beside them lie counts.json and, of what is set aside, quarantine.jsonl. `length` is that of a
    row; `too_long` says what becomes of a conversation that is longer than one.
    """
    counts: collections.Counter[str] = collections.Counter()
    kept: list[ChatTokens] = []
    bad: list[Bad] = []
    for one in conversations:
        try:
            ids, said = chat_tokens(tokenizer, one)
            reason = "" if said[1:].any() else "no token of the assistant"
        except UserError as error:
            reason = str(error)
        if reason:
            bad.append(Bad(one.name, reason, beginning(one.text)))
            continue
        if len(ids) > length + 1:
            if too_long == "drop":
                counts["left out: too long"] += 1
                continue
            ids, said = ids[: length + 1], said[: length + 1]
            if not said[1:].any():
                counts["left out: cut before the assistant speaks"] += 1
                continue
            counts["cut"] += 1
        kept.append(ChatTokens(ids, said))
    counts.update(f"set aside: {row.reason}" for row in bad)
    rows = _packed(np.array([len(one.ids) - 1 for one in kept], np.int64), length, packing)
    order = [item for row in rows for item in row]
    parts = [kept[item] for item in order]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids = np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)])
    said = np.concatenate([np.zeros(0, bool), *(part.assistant for part in parts)])
    counts |= {
        "conversations": len(kept),
        "rows": len(rows),
        "tokens": len(ids) - len(kept),
        "tokens of the assistant": int(said.sum()),
    }
    folder.mkdir()
    np.save(folder / "ids.npy", ids.astype(dtype))
    np.save(folder / "said.npy", said)
    np.save(folder / "begins.npy", np.cumsum([0] + [len(part.ids) for part in parts]))
    np.save(folder / "first.npy", np.cumsum([0] + [len(row) for row in rows]))
    (folder / "counts.json").write_text(json.dumps(counts))
    (folder / "quarantine.jsonl").write_text(as_jsonl(bad), "utf-8")
    seal_folder(folder)


def _packed(sizes: np.ndarray, length: int, packing: RowPacking) -> list[list[int]]:
    """The items of each row; rows in the order of their first item, items in their order."""
    if packing == "none" or not len(sizes):
        return [[item] for item in range(len(sizes))]
    row_of, num_rows = best_fit(sizes, length)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for item, row in enumerate(row_of.tolist()):
        rows[row].append(item)
    return sorted((row for row in rows if row), key=lambda row: row[0])
