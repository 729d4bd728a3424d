"""A source: where records come from, in which format, under which licence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.files import File
from lmjax.prepare.read.jsonl import Jsonl
from lmjax.prepare.read.mail import Email, Mbox
from lmjax.prepare.read.pdf import Pdf
from lmjax.prepare.read.sheet import Piece, Sheet
from lmjax.prepare.read.table import Csv, Parquet
from lmjax.prepare.read.text import Lines, Text
from lmjax.prepare.read.unpack import SUFFIXES
from lmjax.prepare.read.web import Html, Warc


class Format(Protocol):
    """How the files of a source are read: a frozen dataclass, as a stage is."""

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Puts every record of a piece on the sheet, good or bad; yields where it may be cut."""


@runtime_checkable
class Cuttable(Format, Protocol):
    """A format whose large files can be read in parts."""

    def cut(self, file: File, *, target: int) -> Sequence[Piece]:
        """Parts of about `target` bytes, in order, all of the file together."""


FORMATS: dict[str, type] = {
    "text": Text,
    "lines": Lines,
    "jsonl": Jsonl,
    "parquet": Parquet,
    "csv": Csv,
    "html": Html,
    "warc": Warc,
    "email": Email,
    "mbox": Mbox,
    "pdf": Pdf,
}
_SUFFIX_OF = {
    "text": ".txt .text .md .markdown .rst",
    "jsonl": ".jsonl .ndjson",
    "parquet": ".parquet",
    "csv": ".csv .tsv",
    "html": ".html .htm .xhtml",
    "warc": ".warc",
    "email": ".eml",
    "mbox": ".mbox",
    "pdf": ".pdf",
}
_BY_SUFFIX = {suffix: name for name, all_ in _SUFFIX_OF.items() for suffix in all_.split()}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files that records are read from.

    Attributes:
      path: a file, a folder or a glob, here or in an object store ("s3://bucket/folder").
      format: "auto" tells each file's by its suffix; else one of `FORMATS`, or a format itself,
        with settings of its own: call(Jsonl, text="content").
      licence: under which the texts may be used; the manifest says so for every source.
      weight: its share of what a training run draws, in proportion to other sources', all of
        which then need one; 0 for none. None: of each source as much as it holds. The run's own
        `Tokens(weights=...)` replaces them.
    """

    path: str
    format: str | Format = "auto"
    licence: str = "unknown"
    weight: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.format, str) and self.format not in ("auto", *FORMATS):
            raise UserError(
                f"there is no format {self.format!r}."
                + did_you_mean(self.format, ["auto", *FORMATS])
            )
        if self.weight is not None and self.weight < 0:
            raise UserError(f"weight is {self.weight}: give a number of at least 0, or None.")

    def format_of(self, name: str) -> Format | None:
        """The format of a file of this source; None where "auto" cannot tell."""
        if not isinstance(self.format, str):
            return self.format
        kind: str | None = self.format
        if kind == "auto":
            stem = name.lower()
            for suffix in SUFFIXES:
                stem = stem.removesuffix(suffix)
            kind = next((k for s, k in _BY_SUFFIX.items() if stem.endswith(s)), None)
        return None if kind is None else FORMATS[kind]()
