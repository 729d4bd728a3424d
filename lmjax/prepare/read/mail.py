"""E-mail: one message a file, or many in a mailbox."""

from __future__ import annotations

import email
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.header import decode_header
from email.message import Message
from typing import Literal

from lmjax.prepare.read.decode import Undecodable, decode
from lmjax.prepare.read.sheet import Piece, Sheet, to_meta
from lmjax.prepare.read.text import lines_of, read_whole

_HEADERS = ("subject", "from", "to", "date", "message-id", "list-id")
_BLANK = re.compile(rb"\r?\n\r?\n")
# What begins a message in a mailbox: its sender, and when it came as ctime spells it (RFC 4155).
_ENVELOPE = re.compile(rb"From \S*.*\d\d?:\d\d.*\d{4}\s*$")
_QUOTED = re.compile(rb"^>(>*From )", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Email:
    """A file is one message (RFC 5322, MIME), whose headers go into `meta`.

    Attributes:
      body: "text" is what a person reads: the plain parts, or where there are none the html ones,
        which `meta` then gives the content_type text/html; attachments are left out. "source" is
        all that stands below the headers, as it was sent.
    """

    body: Literal["text", "source"] = "text"

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads a message; broken MIME gives what the standard library can make of it."""
        yield from read_whole(piece, sheet, self.add)

    def add(self, sheet: Sheet, number: int, offset: int, data: bytes) -> None:
        """Adds a message, or says why it is none."""
        try:
            message = email.message_from_bytes(data)
            if not message.keys():
                raise Undecodable("no e-mail: it has no header")
            meta = {key.replace("-", "_"): _header(message, key) for key in _HEADERS}
            if self.body == "source":
                _, *below = _BLANK.split(data, maxsplit=1)
                text, how = decode(below[0] if below else b"", message.get_content_charset())
            else:
                text, how, kind = _readable(message)
                if kind == "text/html":
                    meta["content_type"] = kind
        except (Undecodable, LookupError, ValueError, TypeError, AssertionError) as error:
            sheet.bad(number, offset, str(error) or type(error).__name__, data)
            return
        for what in filter(None, how.split("\n")):
            sheet.counts[what] += 1
        if message.defects:
            sheet.counts["e-mails with broken headers or parts"] += 1
        sheet.add(number, text, to_meta(meta))


@dataclass(frozen=True, kw_only=True)
class Mbox:
    """A file holds many messages, each after a line "From SENDER DATE" that follows an empty one.

    Source: RFC 4155; lines that begin with ">From " lose a ">", as in the form mboxrd.

    Attributes:
      body: as that of `Email`.
    """

    body: Literal["text", "source"] = "text"

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads message by message; what stands before the first is quarantined."""
        form, number, begin, lines = Email(body=self.body), 0, 0, list[bytes]()
        blank = True
        for _, offset, line in lines_of(piece, sheet):
            if blank and _ENVELOPE.match(line):
                if self._end(form, sheet, number, begin, lines):
                    number += 1
                    yield
                begin, lines = offset, []
            lines.append(line)
            blank = not line.strip()
        self._end(form, sheet, number, begin, lines)
        yield

    @staticmethod
    def _end(form: Email, sheet: Sheet, number: int, offset: int, lines: list[bytes]) -> bool:
        """Adds the message that some lines are; returns whether there was any."""
        if lines and _ENVELOPE.match(lines[0]):
            form.add(sheet, number, offset, _QUOTED.sub(rb"\1", b"\n".join(lines[1:])))
            return True
        data = b"\n".join(lines)
        if data.strip():
            sheet.bad(number, offset, "no mailbox: no line 'From SENDER DATE' begins it", data)
        return bool(data.strip())


def _readable(message: Message) -> tuple[str, str, str]:
    """The text that a person reads, how it was decoded (a line each), and its type.

    Raises Undecodable where no part is text.
    """
    parts = [(part, kind) for part in message.walk() if (kind := _kind(part))]
    for kind in ("text/plain", "text/html"):
        texts, hows = [], set()
        for part, its in parts:
            if its == kind:
                content = part.get_payload(decode=True)
                assert isinstance(content, bytes)
                text, how = decode(content, part.get_content_charset())
                texts.append(text)
                hows.add(how)
        if any(text.strip() for text in texts):
            return "\n".join(texts), "\n".join(sorted(hows)), kind
    if not parts:
        raise Undecodable(f"an e-mail without text: {message.get_content_type()}")
    return "", "", "text/plain"


def _kind(part: Message) -> str:
    """The type of a part that is text to be read, "" of others. One without a boundary is plain."""
    if part.is_multipart() or part.get_content_disposition() == "attachment":
        return ""
    if part.get_content_maintype() == "multipart":
        return "text/plain"
    kind = part.get_content_type()
    return kind if kind in ("text/plain", "text/html") else ""


def _header(message: Message, key: str) -> str | None:
    """A header as text, encoded words decoded (RFC 2047)."""
    value = message.get(key)
    if value is None:
        return None
    parts = []
    try:
        found = decode_header(value)
    except (ValueError, LookupError):  # of an encoded word that is damaged
        found = [(str(value), None)]
    for piece, charset in found:
        data = piece.encode(errors="surrogateescape") if isinstance(piece, str) else piece
        try:
            parts.append(decode(data, charset)[0])
        except Undecodable:
            parts.append(data.decode(errors="replace"))
    return " ".join("".join(parts).split())
