"""Bytes to text: by its mark, as UTF-8, by the charset that it declares, or repaired by a rule."""

from __future__ import annotations

import codecs
import contextlib

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, with whose mark it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What is declared as Latin-1 or ASCII is read as the web's standard has it (WHATWG Encoding, 4.2).
_READ_AS = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}
_FEW = 1 / 1000  # of the bytes: where no more are bad, text is taken for damaged UTF-8


class Undecodable(ValueError):
    """The bytes are no text; its message says why."""


def decode(data: bytes, declared: str | None = None) -> tuple[str, str]:
    """The text of some bytes, and what was done to read them ("" if they were plain UTF-8).

    UTF-8, where the bytes are valid; else the byte order mark at its beginning decides; else the
    declared charset. Else, where few bytes are bad, each is replaced by U+FFFD; where many are, it
    was written in a one-byte charset, and is read as Windows-1252. Raises Undecodable for binary
    data.
    """
    try:
        text = data.decode()
        if "\0" not in text:
            return text.removeprefix("\ufeff"), ""
    except UnicodeDecodeError:
        for mark, name in _MARKS:
            if data.startswith(mark):
                return _decode(data[len(mark) :], name)
    if b"\0" in data:
        raise Undecodable(f"binary: a zero at byte {data.index(0)}")
    if name := _charset(declared):
        with contextlib.suppress(UnicodeError):
            text = data.decode(name)
            text.encode()  # half of a surrogate pair, which some charsets can spell, is no text
            return text, f"decoded as {name}, declared"
    text = data.decode(errors="replace")
    if text.count("\ufffd") <= max(1, len(data) * _FEW) and not _declared_one_byte(declared):
        return text, "invalid UTF-8 replaced by U+FFFD"
    return data.decode("cp1252", errors="replace"), "decoded as cp1252, guessed"


def _decode(data: bytes, name: str) -> tuple[str, str]:
    try:
        return data.decode(name), f"decoded as {name}, by its byte order mark"
    except UnicodeDecodeError:
        return data.decode(name, errors="replace"), f"invalid {name} replaced by U+FFFD"


def _charset(declared: str | None) -> str:
    """Python's name of a charset that is declared, "" where it has none or it is no text's."""
    try:
        info = codecs.lookup((declared or "").strip().strip("\"'"))
    except (LookupError, ValueError):  # unknown; or a zero in its name
        return ""
    if not getattr(info, "_is_text_encoding", True) or info.name == "utf-8":
        return ""
    return _READ_AS.get(info.name, info.name)


def _declared_one_byte(declared: str | None) -> bool:
    return _charset(declared) == "cp1252"
