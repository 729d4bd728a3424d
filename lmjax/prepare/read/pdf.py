"""PDF: one document a file, its text layer only."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from lmjax.errors import UserError
from lmjax.prepare.read.sheet import Piece, Sheet, to_meta
from lmjax.prepare.read.text import read_whole


@dataclass(frozen=True, kw_only=True)
class Pdf:
    """A file is one document: the text of its pages; scanned ones have none and are quarantined."""

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads a document."""
        try:
            import pypdf  # noqa: F401, whether it is there is all that is asked
        except ImportError as error:
            raise UserError("PDF files need `pip install pypdf`.") from error
        yield from read_whole(piece, sheet, _add)


def _add(sheet: Sheet, number: int, offset: int, data: bytes) -> None:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # what it warns of is told by quarantine
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        pages = [page.extract_text() for page in reader.pages]
    except Exception as error:  # a parser of untrusted bytes: IndexError, RecursionError, ...
        sheet.bad(number, offset, f"no PDF that can be read: {type(error).__name__}", data)
        return
    text = "\n\n".join(pages).encode(errors="replace").decode()
    if not text.strip():
        sheet.bad(number, offset, "a PDF without text: its pages are pictures", data)
        return
    sheet.add(number, text, to_meta({"pages": len(pages)}))
