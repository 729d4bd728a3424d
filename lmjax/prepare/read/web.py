"""Web pages: html in files, and in WARC archives as crawlers write them."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmjax.errors import UserError
from lmjax.prepare.read.decode import Undecodable, decode
from lmjax.prepare.read.sheet import Piece, Sheet, to_meta
from lmjax.prepare.read.text import read_whole

# Within its first 1024 bytes a page may declare its charset (WHATWG HTML, charset).
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w:.-]+)""", re.IGNORECASE)
_PRESCAN = 1024
_PAGES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True, kw_only=True)
class Html:
    """A file is one page, whose markup a later stage makes text of: `meta` has its type."""

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads a file."""
        yield from read_whole(piece, sheet, _add_page)


@dataclass(frozen=True, kw_only=True)
class Warc:
    """The pages among an archive's responses (ISO 28500); what is no page is counted, not read.

    `meta` has url, date, content_type; offsets are those in the file as it lies there, compressed
    or not. Bodies are decoded as their HTTP headers say. Damage ends the reading of a file.
    """

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads an archive, record by record."""
        archive = _fastwarc()
        number, offset = 0, 0
        with piece.file.open() as raw:
            try:
                for record in archive.ArchiveIterator(raw, parse_http=False):
                    offset = record.stream_pos
                    if _add_response(sheet, number, record):
                        number += 1
                    yield
            except (OSError, ValueError, EOFError) as error:
                why = f"the rest of the file is lost: {str(error).splitlines()[0]}"
                sheet.bad(number, offset, f"{why} after the record that begins here", b"")


def _add_page(sheet: Sheet, number: int, offset: int, data: bytes, **known: Any) -> None:
    """Adds a page: `known` are fields for `meta`, of which `charset` tells how to decode it."""
    found = _CHARSET.search(data[:_PRESCAN])
    charset = known.pop("charset", None) or (found[1].decode() if found else None)
    try:
        text, how = decode(data, charset)
    except Undecodable as error:
        sheet.bad(number, offset, str(error), data)
        return
    if how:
        sheet.counts[how] += 1
    sheet.add(number, text, to_meta({"content_type": "text/html", **known}))


def _add_response(sheet: Sheet, number: int, record: Any) -> bool:
    """Adds a WARC record if it is a page, good or bad; returns whether it was."""
    data = record.reader.read()
    headers = {key.lower(): value for key, value in record.headers.items()}
    kind, offset = headers.get("warc-type", ""), record.stream_pos
    if not _whole(headers.get("content-length", ""), len(data)):
        sheet.bad(number, offset, "a record that is cut off", data)
        return True
    if kind != "response":
        sheet.counts[f"WARC records of type {kind or 'none'} passed over"] += 1
        return False
    head, _, body = data.partition(b"\r\n\r\n")
    http = {
        key.strip().lower(): value.strip()
        for key, _, value in (line.partition(":") for line in head.decode("latin-1").split("\r\n"))
    }
    content_type, _, parameters = http.get("content-type", "").partition(";")
    if content_type.strip().lower() not in _PAGES:
        sheet.counts["WARC responses that are no page passed over"] += 1
        return False
    charset = re.search(r"charset\s*=\s*([^;\s]+)", parameters, re.IGNORECASE)
    try:
        body = _unchunked(body) if http.get("transfer-encoding", "") == "chunked" else body
        body = _inflated(body, http.get("content-encoding", "").lower())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        sheet.bad(number, offset, f"an HTTP body that cannot be decoded: {error}", body)
        return True
    _add_page(
        sheet,
        number,
        offset,
        body,
        charset=charset[1] if charset else None,
        url=headers.get("warc-target-uri"),
        date=headers.get("warc-date"),
    )
    return True


def _whole(told: str, found: int) -> bool:
    """Whether a record has as many bytes as it tells of. One cut in its header tells of none."""
    return told.strip().isdigit() and int(told) == found


def _unchunked(body: bytes) -> bytes:
    """The body without its chunks' sizes (RFC 9112, 7.1); as it is where crawlers took them out."""
    if not re.match(rb"[0-9a-fA-F]+\s*(;[^\r\n]*)?\r\n", body):
        return body
    parts = []
    while body:
        line, _, body = body.partition(b"\r\n")
        if not (size := int(line.partition(b";")[0], 16)):
            break
        parts.append(body[:size])
        body = body[size + 2 :]
    return b"".join(parts)


def _inflated(body: bytes, coding: str) -> bytes:
    """The body decompressed; as it is where crawlers did so and left the header."""
    if coding in ("gzip", "x-gzip") and body.startswith(b"\x1f\x8b"):
        return gzip.decompress(body)
    if coding == "deflate" and body[:1] == b"\x78":
        return zlib.decompress(body)
    if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise ValueError(f"content-encoding {coding}")
    return body


def _fastwarc() -> Any:
    try:
        from fastwarc import warc
    except ImportError as error:
        raise UserError("WARC files need `pip install 'lmjax[prepare]'`: no fastwarc.") from error
    return warc
