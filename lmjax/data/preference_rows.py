"""Preferences out of jsonl: prompts with a better and a worse completion, or with a judged one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from lmjax.data.quarantine import Bad, beginning, counted
from lmjax.data.source import find_files, text_of_file
from lmjax.errors import UserError

MADE = "made"
Kind = Literal["pairs", "labelled"]
# A text, or messages, each a dict with "role" and "content".
Side = str | list[dict[str, Any]]


class Row(NamedTuple):
    """A prompt and its completions: the better and the worse one, or one with its label."""

    name: str
    prompt: Side
    completions: tuple[Side, ...]
    label: int = 1


def read_rows(path: str, *, kind: Kind) -> tuple[list[Row], list[Bad]]:
    """Reads every row, (good ones, bad ones), in the order of files and lines.

    A line is {"prompt", "chosen", "rejected"} or {"prompt", "completion", "label"}, each side a
    text or a list of messages, the label true or false (1 or 0). Where labelled texts are asked
    for, a pair is two of them; the other way round a row is bad.

    Args:
      path: a file, a folder or a glob of .jsonl (.gz too); "made" for small pairs that need none.
      kind: what is asked for.

    Raises:
      UserError: where there is no such file, or no good row.
    """
    records = iter(made()) if path == MADE else _records(path)
    good: list[Row] = []
    bad: list[Bad] = []
    for name, record in records:
        found = _rows(name, record, kind)
        if isinstance(found, str):
            raw = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)
            bad.append(Bad(name, found, beginning(raw)))
        else:
            good += found
    if not good:
        raise UserError(
            f"{path} holds no preference ({counted(bad)}). Write lines of "
            '{"prompt": ..., "chosen": ..., "rejected": ...}'
            + (', or of {"prompt": ..., "completion": ..., "label": ...}.' * (kind == "labelled"))
        )
    return good, bad


def text_of(side: Side) -> str:
    """What is said, without who says it."""
    return side if isinstance(side, str) else "\n".join(str(m["content"]) for m in side)


def digest(prompt: Side) -> bytes:
    """The sha256 of a prompt."""
    return hashlib.sha256(json.dumps(prompt, ensure_ascii=False).encode()).digest()


def made() -> list[tuple[str, dict[str, Any]]]:
    """Some hundred questions, each with a friendly answer and a rude one: for trying things out."""
    things = (
        "the station",
        "a pharmacy",
        "the museum",
        "my hotel",
        "a cash machine",
        "the harbour",
    )
    wanted = (
        "Where is {}?",
        "How far is {} from here?",
        "Can you show me {}?",
        "Is {} open today?",
    )
    openings = ("", "Hello! ", "Excuse me. ", "Sorry, ")
    friendly = (
        "Of course, I am glad to help.",
        "Sure, let me look that up.",
        "Yes, with pleasure.",
    )
    rude = ("Find it yourself.", "Why do you ask me?", "Not my problem.")
    found: list[tuple[str, dict[str, Any]]] = []
    for a, opening in enumerate(openings):
        for b, want in enumerate(wanted):
            for c, thing in enumerate(things):
                record = {
                    "prompt": f"{opening}{want.format(thing)}\n",
                    "chosen": friendly[(a + b + c) % len(friendly)],
                    "rejected": rude[(a + 2 * b + c) % len(rude)],
                }
                found.append((f"{MADE}:{len(found)}", record))
    return found


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """(file and line, the line's JSON, or its text where it is none)."""
    for file in find_files(path):
        if ".jsonl" not in map(str.lower, file.suffixes):
            raise UserError(f"{file}: preferences are read from .jsonl, one in each line.")
        for number, line in enumerate(text_of_file(file).split("\n"), start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = line
                yield f"{file}:{number}", record


def _rows(name: str, record: Any, kind: Kind) -> list[Row] | str:
    """The rows that a record holds, or why it cannot be used."""
    if not isinstance(record, dict):
        return "no JSON object"
    if "chosen" in record or "rejected" in record:
        names: tuple[str, ...] = ("chosen", "rejected")
    elif kind == "pairs":
        return "no chosen and no rejected"
    else:
        names = ("completion",)
    for side in ("prompt", *names):
        if reason := _wrong(side, record.get(side)):
            return reason
    prompt = record["prompt"]
    sides = [record[side] for side in names]
    if isinstance(prompt, str) and not all(isinstance(side, str) for side in sides):
        return "the prompt is a text, and a completion messages"
    if not isinstance(prompt, str):
        said = [[{"role": "assistant", "content": x}] if isinstance(x, str) else x for x in sides]
        sides = said
    if names == ("completion",):
        label = record.get("label")
        if label not in (0, 1):  # True and False are
            return "the label is neither true nor false"
        return [Row(name, prompt, (sides[0],), int(label))]
    if sides[0] == sides[1]:
        return "chosen and rejected are the same"
    if kind == "pairs":
        return [Row(name, prompt, tuple(sides))]
    return [Row(name, prompt, (side,), label) for side, label in zip(sides, (1, 0), strict=True)]


def _wrong(side: str, value: Any) -> str:
    """Why a side cannot be used; "" where it can."""
    if value is None or (isinstance(value, (str, list)) and not value):
        return f"{side} is empty"
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return f"{side} is neither a text nor messages"
    contents = [message.get("content") for message in messages]
    if not all(isinstance(x, str) for x in [*contents, *(m.get("role") for m in messages)]):
        return f"{side} has a message without a role or a text"
    try:
        "".join(contents).encode()
    except UnicodeEncodeError:
        return f"{side} is no valid Unicode"
    return "" if contents[-1].strip() else f"{side} is empty"
