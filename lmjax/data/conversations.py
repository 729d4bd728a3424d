"""Conversations out of files: who said what, and which of the records are none.

"made" is a corpus made by code: small sums, asked and answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.data.quarantine import Bad, beginning
from lmjax.data.source import find_files, text_of_file
from lmjax.errors import UserError

MADE = "made"
ASSISTANT = "assistant"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages as chat templates read them, {"role", "content", ...}, and tools if there are any.

    Args:
      name: where it stands, `path:line`, or `path:key`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    name: str

    @property
    def text(self) -> str:
        """All of it but the name, as JSON."""
        return json.dumps([self.messages, self.tools], sort_keys=True)

    @property
    def digest(self) -> bytes:
        """Sha256 of its text: equal for copies."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def share(self) -> float:
        """The digest as a number from 0 to 1, by which conversations are held out."""
        return int.from_bytes(self.digest[:8], "big") / 2**64


def read_conversations(path: str) -> tuple[list[Conversation], list[Bad]]:
    """Every conversation, and what is none, in an order that depends on names alone.

    A .jsonl has one in each line, a .json a list of them: {"messages": [{"role", "content"}]}, with
    "tools" or without. A .json may also hold conversations by name, whose messages are
    {"sender", "text"}, alone or in lists, as in the package chitchat-dataset: who speaks first is
    then the user, the other one the assistant, and what one says at a time is one message, of a
    line for each.

    Args:
      path: a file, a folder or a glob of these (a .jsonl may be .gz); "package:NAME/PATH" for the
        files of an installed package, which is not imported; "made" for some that need no file.

    Raises:
      UserError: for files that are not there, cannot be read, or are of another kind, and where
        nothing is a conversation.
    """
    if path == MADE:
        return made(), []
    good: list[Conversation] = []
    bad: list[Bad] = []
    for file in find_files(path):
        for name, record in _records(file):
            found = _conversation(name, record)
            if isinstance(found, Conversation):
                good.append(found)
            else:
                shown = record if isinstance(record, str) else json.dumps(record)
                bad.append(Bad(name, found, beginning(shown)))
    if not good:
        why = f": {bad[0].name} has {bad[0].reason}" if bad else ""
        raise UserError(
            f'{path} holds no conversation{why}. Write {{"messages": [{{"role": "user", '
            '"content": "..."}, {"role": "assistant", "content": "..."}]} in each line of a .jsonl.'
        )
    return good, bad


def made() -> list[Conversation]:
    """400 short conversations, of one to three sums each, drawn once and for all."""
    found = []
    for index in range(400):
        messages = []
        for turn in range(1 + index % 3):
            digest = hashlib.sha256(f"sum {index} {turn}".encode()).digest()
            a, b = digest[0] % 10, digest[1] % 10
            messages += [
                {"role": "user", "content": f"{a} + {b}?"},
                {"role": ASSISTANT, "content": f"It is {a + b}."},
            ]
        found.append(Conversation(messages=messages, tools=None, name=f"{MADE}:{index}"))
    return found


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """(name, record) of each; a line that is no JSON comes as text."""
    text = text_of_file(file)
    kind = next((s for s in map(str.lower, reversed(file.suffixes)) if s != ".gz"), "")
    if kind == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = line
                yield f"{file}:{number}", record
        return
    if kind != ".json":
        raise UserError(f"{file} is neither .jsonl nor .json: give conversations in one of these.")
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}. Mend it, or leave it out.") from error
    if isinstance(held, dict):
        yield from ((f"{file}:{key}", record) for key, record in held.items())
    elif isinstance(held, list):
        yield from ((f"{file}:{number}", record) for number, record in enumerate(held))
    else:
        raise UserError(f"{file} holds neither a list of conversations nor such by name.")


def _conversation(name: str, record: Any) -> Conversation | str:
    """A conversation, or what is wrong with the record."""
    if isinstance(record, str):
        return "no JSON"
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        return "no list of messages"
    flat = [x for given in messages for x in (given if isinstance(given, list) else [given])]
    if not all(isinstance(message, dict) for message in flat):
        return "a message that is no JSON object"
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        return "tools that are no list"
    found: list[dict[str, Any]] | str = flat
    if any("sender" in message for message in flat):
        found = _of_speakers(flat)
    elif not all(isinstance(m.get("role"), str) and "content" in m for m in flat):
        found = "a message without role and content"
    if isinstance(found, str):
        return found
    if not any(message["role"] == ASSISTANT for message in found):
        return "nothing that the assistant says"
    conversation = Conversation(messages=found, tools=tools or None, name=name)
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "text that is not valid Unicode"
    return conversation


def _of_speakers(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | str:
    """Messages of two speakers in turns of the user and the assistant."""
    turns: list[tuple[str, list[str]]] = []
    for message in messages:
        sender, text = message.get("sender"), message.get("text")
        if not isinstance(sender, str) or not isinstance(text, str):
            return "a message without sender and text"
        if not text.strip():
            continue
        if not turns or turns[-1][0] != sender:
            turns.append((sender, []))
        turns[-1][1].append(text.strip())
    speakers = list(dict.fromkeys(sender for sender, _ in turns))
    if len(speakers) > 2:
        return "more than two speakers"
    roles = dict(zip(speakers, ("user", ASSISTANT), strict=False))
    return [{"role": roles[sender], "content": "\n".join(texts)} for sender, texts in turns]
