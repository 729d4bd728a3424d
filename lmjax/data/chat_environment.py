"""The sandbox in which chat templates run; imported where one is rendered, as it needs jinja2."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from lmjax.data.chat import now, to_json


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it; see `lmjax.data.chat.ChatTemplate`."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = to_json
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": now,
            "namespace": _Namespace,
        }
        self.pieces: list[str] = []
        self.spans: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def recording(self, pieces: list[str]) -> Iterator[list[tuple[int, int]]]:
        """Gives the list that spans of `{% generation %}` are added to, as offsets in `pieces`."""
        self.pieces, self.spans = pieces, []
        yield self.spans


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` stands around what the assistant says.

    Source: `return_assistant_tokens_mask` of transformers. At the top of a template Jinja hands its
    output on piece by piece, so that the block's offset is the length of all pieces before it.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_record")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _record(self, caller: Callable[[], str]) -> str:
        text = caller()
        environment: Any = self.environment
        start = sum(map(len, environment.pieces))
        environment.spans.append((start, start + len(text)))
        return text


class _Namespace(jinja2.utils.Namespace):
    """Jinja's own, but names that begin with an underscore lead behind the sandbox's values."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace may not hold {name!r}")


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
