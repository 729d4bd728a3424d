"""Conversations as text: the Jinja templates that published models carry, in a sandbox.

A template is a program of a stranger. It sees plain values only, changes none of them, and reaches
no Python behind them (`jinja2.sandbox.ImmutableSandboxedEnvironment`); it can still take long.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmjax.errors import UserError

_MARK = "lmjax:the message goes on here "  # its last character shows whether a template trims


class Rendered(NamedTuple):
    """The text of a conversation, and (start, end) of what the assistant says in it.

    `assistant` is empty where the template has no `{% generation %}`.
    """

    text: str
    assistant: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A model's templates; "tool_use" is taken where there are tools, else "default".

    Source: the text of `apply_chat_template` in transformers, which is what templates are written
    for: blocks are trimmed, `tojson` does not escape, and there are `raise_exception`,
    `strftime_now`, break and continue.
    """

    templates: tuple[tuple[str, str], ...]
    special_tokens: tuple[tuple[str, str], ...] = ()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The conversation as text.

        Args:
          messages: each with "role" and "content", and what else the template reads.
          tools: JSON schemas of functions.
          add_generation_prompt: ends with what begins the assistant's answer.
          continue_final_message: ends within the last message, which the model goes on with.
          variables: further names that the template may read, such as enable_thinking.

        Raises UserError where the template refuses the messages or is broken.
        """
        if add_generation_prompt and continue_final_message:
            raise UserError(
                "add_generation_prompt begins an answer, continue_final_message goes on with one: "
                "set one of them."
            )
        held = _plain(list(messages), "messages")
        wrong = [message for message in held if not isinstance(message, dict)]
        if wrong or not held:
            raise UserError(f"messages must be dicts with a role and a content, and not {held!r}.")
        text = _marked(held) if continue_final_message else ""
        values = {
            **dict(self.special_tokens),
            **_plain(dict(variables or {}), "variables"),
            "messages": held,
            "tools": None if tools is None else _plain(list(tools), "tools"),
            "documents": None if documents is None else _plain(list(documents), "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = _run(self._chosen(tools is not None), values)
        return _before_mark(rendered, text) if continue_final_message else rendered

    def _chosen(self, tools: bool) -> str:
        named = dict(self.templates)
        if tools and "tool_use" in named:
            return named["tool_use"]
        if "default" in named:
            return named["default"]
        raise UserError(f"there is no default chat template; there are {', '.join(named)}.")


def _marked(messages: list[Any]) -> str:
    """Puts the mark at the end of the last message's text, and returns that text."""
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _MARK
        return content
    for block in reversed(content if isinstance(content, list) else []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text: str = block["text"]
            block["text"] = text + _MARK
            return text
    raise UserError(
        "continue_final_message is set, and the last message has no text to go on with."
    )


def _before_mark(rendered: Rendered, text: str) -> Rendered:
    at = rendered.text.rfind(_MARK.strip())
    once = rendered.text.count(_MARK.strip()) == 1
    if not once or text.strip() not in rendered.text:
        raise UserError(
            "continue_final_message is set, and the template does not write the last message as it "
            "is, and once: leave it out."
        )
    whole = rendered.text[:at]
    if not rendered.text.startswith(_MARK, at):  # it trims messages, so it would trim this one
        whole = whole.rstrip()
    spans = [(start, min(end, len(whole))) for start, end in rendered.assistant]
    return Rendered(whole, tuple(span for span in spans if span[0] < span[1]))


def _run(template: str, values: Mapping[str, Any]) -> Rendered:
    try:
        import jinja2
    except ImportError as error:
        raise UserError("chat templates need jinja2: pip install 'lmjax[chat]'.") from error
    try:
        environment, compiled = _compiled(template)
        pieces: list[str] = []
        with environment.recording(pieces) as spans:
            for piece in compiled.generate(**values):
                pieces.append(piece)
        return Rendered("".join(pieces), tuple(spans))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is broken in line {error.lineno}: {error}.") from error
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the messages: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the chat template fails on the messages: {error}.") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> tuple[Any, Any]:
    from lmjax.data.chat_environment import ChatEnvironment

    environment = ChatEnvironment()
    return environment, environment.from_string(template)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of chat templates: plain JSON, where Jinja's own escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def now(format: str) -> str:
    """The function `strftime_now` of chat templates."""
    return datetime.datetime.now().strftime(format)


def _plain(value: Any, name: str) -> Any:
    """A copy made of plain values alone: objects have methods, which a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(held, name) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held, name) for held in value]
    raise UserError(
        f"{name} holds {value!r}, a {type(value).__name__}: a chat template may see texts, "
        "numbers, lists and dicts alone."
    )
