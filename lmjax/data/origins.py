"""Where an example comes from: which tokens and characters of which documents it holds.

Ranges are (first, one past the last), as of slices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmjax.data.source import Document
from lmjax.data.tokenizer import TextTokenizer
from lmjax.data.windows import Windows

Range = tuple[int, int]
CHUNK = 1 << 20  # tokens whose bytes are counted at a time


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of one document's tokens in an example.

    Args:
      columns: which columns of the example they fill.
      document: the document's number in its split, from 0.
      name: where the document was read from: a path, `path:line` or `tfds:name:index`.
      tokens: which of the document's tokens, its end included; those of its half where the split
        cuts documents in two.
      characters: which characters of the document as it was read, parts of characters counted;
        None where the tokenizer changes text, so that its tokens tell no place in it.
    """

    columns: Range
    document: int
    name: str
    tokens: Range
    characters: Range | None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The pieces of one example, in order; columns in none of them are padding.

    `pieces` are None where a data set does not tell where its tokens come from. `source` names the
    example's source in a mixture ("outer/inner" in a mixture of mixtures).
    """

    source: str = ""
    pieces: tuple[Piece, ...] | None


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Origins of the windows of a split, by random access.

    An origin costs time in proportion to the documents it lies in, up to its place in them.
    """

    windows: Windows
    documents: Sequence[Document]
    tokenizer: TextTokenizer

    def at(self, start: int) -> Origin:
        """Where `windows.at(start)` comes from."""
        pieces = []
        for number, first, end in self.windows.documents(start):
            document, begin = self.documents[number], int(self.windows.tokens.starts[number])
            pieces.append(
                Piece(
                    columns=(first - start, end - start),
                    document=number,
                    name=document.name,
                    tokens=(first - begin, end - begin),
                    characters=self._characters(document, begin, first, end),
                )
            )
        return Origin(pieces=tuple(pieces))

    def _characters(self, document: Document, begin: int, first: int, end: int) -> Range | None:
        """The characters behind the tokens first..end of a document whose first is `begin`."""
        before, size = self._num_bytes(begin, first), self._num_bytes(first, end)
        text = _utf8(document.text)
        spelled = text[before : before + size].tobytes().decode("utf-8", "replace")
        at_end = before == len(text)  # where the tokens are the document's end alone
        if spelled != self.tokenizer.decode(self.windows.tokens.ids[first:end]) or (
            not size and not at_end
        ):
            return None
        one = _num_characters(text[: before + 1]) - (0 if at_end else 1)
        return document.begin + one, document.begin + _num_characters(text[: before + size])

    def _num_bytes(self, first: int, end: int) -> int:
        """Bytes of text behind the tokens first..end of the split."""
        ids, table = self.windows.tokens.ids, self.windows.token_bytes.astype(np.int64)
        chunks = (ids[i : min(i + CHUNK, end)] for i in range(first, end, CHUNK))
        return sum(int(table[chunk].sum()) for chunk in chunks)


@functools.lru_cache(maxsize=2)
def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _num_characters(utf8: np.ndarray) -> int:
    """How many characters begin in these bytes."""
    return int(np.count_nonzero(utf8 & 0xC0 != 0x80))
