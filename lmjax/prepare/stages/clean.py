"""Text as it was meant: encodings repaired, html read, control characters and blanks removed.

Every repair is counted, in records; what is left empty, or of an unusual length, is dropped.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa

from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.stage import Result, judged, set_aside, with_column

Html = Literal["auto", "always", "never"]
Boilerplate = Literal["remove", "keep"]
Form = Literal["NFC", "NFKC", ""]
WhiteSpace = Literal["lines", "words", "keep"]

# What text that was decoded wrongly cannot do without; ftfy judges the lines that have it.
_MAYBE_WRONG = re.compile("[^\x00-\x7f]{2}|[\x80-\x9fÂÃâ]")
# C0 but tab and newline, DEL, C1; soft hyphen; zero-width space, marks and embeddings of
# direction; byte order mark; interlinear marks; noncharacters. Joiners (U+200C, U+200D) spell
# words: they stay.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069"
    "\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_LINE_ENDS = re.compile("\r\n?|[\u2028\u2029]")
_MANY_EMPTY_LINES = re.compile(r"\n{3,}")
_SPACES = re.compile(r"[^\S\n]+")
_HTML_START = re.compile(
    r"(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S
)
_TAG = re.compile(
    r"</?(?:a|b|i|p|br|hr|em|li|ol|ul|td|th|tr|dl|dt|dd|h[1-6]|div|pre|img|font|span|table|strong"
    r"|center|script|style|title|meta|link|form|input|blockquote)(?:\s[^<>]*)?/?>",
    re.I,
)


@dataclass(frozen=True, kw_only=True)
class Clean:
    """Repairs and normalises texts, in this order: html, encoding, characters, NFC, white space.

    Args:
      html: "auto" reads records as html whose meta says `content_type` text/html, or that begin
        as a page, or with a tag of which one stands every 200 characters; "always"; or "never".
      boilerplate: "remove" keeps of a page its main content alone (resiliparse's rules); "keep".
      encoding: repairs lines in which UTF-8 was read as another encoding (ftfy's rules).
      unicode: the normal form: "NFC", "NFKC", or "" for none.
      white_space: "lines" ends lines with newlines alone, removes blanks at their ends and empty
        lines beyond one; "words" also turns runs of blanks into one space, which takes the
        indentation from code; "keep" leaves all as it is.
      min_characters: shorter texts are dropped.
      max_characters: longer ones too; 0 for no limit.
    """

    html: Html = "auto"
    boilerplate: Boilerplate = "remove"
    encoding: bool = True
    unicode: Form = "NFC"
    white_space: WhiteSpace = "lines"
    min_characters: int = 1
    max_characters: int = 10_000_000

    def __post_init__(self) -> None:
        for name, allowed in (
            ("html", Html),
            ("boilerplate", Boilerplate),
            ("unicode", Form),
            ("white_space", WhiteSpace),
        ):
            if (given := getattr(self, name)) not in get_args(allowed):
                raise UserError(f"{name}={given!r}." + did_you_mean(given, get_args(allowed)))

    def __call__(self, records: pa.Table) -> Result:
        """Cleans each text; counts each repair by the records that it changed."""
        counts: Counter[str] = Counter()
        texts: list[str] = []
        reasons: list[str | None] = []
        details: list[str] = []
        failed: dict[str, str] = {}
        columns = (records[name].to_pylist() for name in ("id", "text", "meta"))
        for name, text, meta in zip(*columns, strict=True):
            try:
                text = self._cleaned(text or "", meta or "", counts)
            except UserError:
                raise
            except Exception as error:  # of a library, on text that nobody foresaw
                failed[name] = f"{type(error).__name__}: {error}"
            reason = None
            if not text.strip():
                reason = "empty"
            elif len(text) < self.min_characters:
                reason = "too short"
            elif self.max_characters and len(text) > self.max_characters:
                reason = "too long"
            texts.append(text)
            reasons.append(reason)
            details.append(f"{len(text)} characters")
        cleaned = with_column(records, "text", pa.array(texts, pa.large_string()))
        result = judged(cleaned, reasons, details=details, counts=dict(sorted(counts.items())))
        return set_aside(result, records, failed) if failed else result

    def _cleaned(self, text: str, meta: str, counts: Counter[str]) -> str:
        for name, repair in self._repairs(meta):
            repaired = repair(text)
            if repaired != text:
                counts[name] += 1
                text = repaired
        return text

    def _repairs(self, meta: str) -> list[tuple[str, Callable[[str], str]]]:
        repairs: list[tuple[str, Callable[[str], str]]] = []
        if self.html == "always" or (self.html == "auto" and '"text/html' in meta):
            repairs.append(("html read", self._read_html))
        elif self.html == "auto":
            repairs.append(("html read", lambda t: self._read_html(t) if looks_like_html(t) else t))
        if self.encoding:
            repairs.append(("encoding repaired", repair_encoding))
        # First this: letters and marks may meet where a control character stood between them.
        repairs.append(("control characters removed", remove_control_characters))
        if self.unicode:
            repairs.append((f"normalised to {self.unicode}", self._normal_form))
        if self.white_space != "keep":
            repairs.append(("white space normalised", self._white_space))
        return repairs

    def _read_html(self, text: str) -> str:
        return read_html(text, main_content=self.boilerplate == "remove")

    def _normal_form(self, text: str) -> str:
        return text if text.isascii() else unicodedata.normalize(self.unicode or "NFC", text)

    def _white_space(self, text: str) -> str:
        return normalise_white_space(text, spaces=self.white_space == "words")


def looks_like_html(text: str) -> bool:
    """Whether a text begins as a page, or with a tag and holds one in 200 characters."""
    start = text[:2000].lstrip()
    if not start.startswith("<"):
        return False
    if _HTML_START.match(start):
        return True
    if not _TAG.match(start):
        return False
    found = sum(1 for _ in _TAG.finditer(text[:20_000]))
    return found >= 4 and found * 200 >= min(len(text), 20_000)


def read_html(text: str, *, main_content: bool) -> str:
    """The text that a page shows, block by block; `main_content` leaves out menus and footers.

    Where nothing is held to be main content (a mail, a short page), all of the page is read.
    Raises UserError without the package resiliparse.
    """
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise UserError("reading html needs `pip install resiliparse` (lmjax[prepare]).") from error
    options: Any = {"alt_texts": False, "preserve_formatting": True, "list_bullets": True}
    out: str = extract_plain_text(text, main_content=main_content, **options)
    if main_content and not out.strip():
        out = extract_plain_text(text, main_content=False, **options)
    return out


def repair_encoding(text: str) -> str:
    """Undoes UTF-8 that was read as Latin-1, Windows-125x or MacRoman, line by line.

    Raises UserError without the package ftfy.
    """
    if text.isascii():
        return text
    try:
        from ftfy import fix_encoding
        from ftfy.badness import is_bad
    except ImportError as error:
        raise UserError("repairing encodings needs `pip install ftfy` (lmjax[prepare]).") from error
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if not line.isascii() and _MAYBE_WRONG.search(line) and is_bad(line):
            lines[i] = fix_encoding(line)
    return "\n".join(lines)


def remove_control_characters(text: str) -> str:
    """Ends lines with a newline, and removes what is not seen and spells nothing."""
    if "\r" in text or not text.isascii():
        text = _LINE_ENDS.sub("\n", text)
    return _CONTROL.sub("", text)


def normalise_white_space(text: str, *, spaces: bool) -> str:
    """No blanks around the text or at ends of lines, one empty line at most; see `Clean`."""
    if spaces:
        text = _SPACES.sub(" ", text)
    if " \n" in text or "\t\n" in text or not text.isascii():
        text = "\n".join(map(str.rstrip, text.split("\n")))
    return _MANY_EMPTY_LINES.sub("\n\n", text).strip("\n").rstrip()
