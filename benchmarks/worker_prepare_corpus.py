"""A corpus for `benchmarks.prepare`: real documents of all folders given, mixed, as jsonl files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmjax.errors import UserError
from lmjax.prepare.files import find
from lmjax.prepare.read.sheet import Piece, Sheet
from lmjax.prepare.read.source import Source
from lmjax.prepare.stages.clean import Clean

_MOST = 8000  # characters of a document: what is longer (a dictionary, a play) is cut
_BREAK = re.compile(r"\n\s*\n")


def make_corpus(sources: Sequence[str], folder: Path, *, megabytes: float, files: int) -> int:
    """Writes about `megabytes` of text to `files` files; returns how many documents they hold.

    Args:
      sources: [FORMAT:]PATH of each: a file, a folder or a glob, read and cleaned as lmjax does.
      folder: where the files go.
      megabytes: how much of the documents, mixed at random by a fixed seed, is taken; all of them
        where they are less.
      files: of equal numbers of documents.
    """
    texts = [text for source in sources for text in _documents(source)]
    random.Random(0).shuffle(texts)
    size, taken = 0, []
    for text in texts:
        if size > megabytes * 1e6:
            break
        size += len(text.encode())
        taken.append(text)
    if len(taken) < files:
        raise UserError(f"{len(taken)} documents make no corpus: give --corpus more folders.")
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-len(taken) // files)
    for number in range(files):
        part = range(number * each, min((number + 1) * each, len(taken)))
        lines = (json.dumps({"id": str(i), "text": taken[i]}, ensure_ascii=False) for i in part)
        (folder / f"{number:03d}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return len(taken)


def _documents(source: str) -> Iterator[str]:
    form, colon, path = source.partition(":")
    given = Source(path=path, format=form) if colon else Source(path=source)
    sheet = Sheet("corpus")
    for file in find(given.path):
        sheet.begin(file)
        if reader := given.format_of(file.name):
            for _ in reader.read(Piece(file=file), sheet):
                pass
    for text in Clean(max_characters=0)(sheet.take().kept).kept["text"].to_pylist():
        yield from _cut(text)


def _cut(text: str) -> Iterator[str]:
    """Parts of at most about `_MOST` characters that end at an empty line where there is one."""
    begin = 0
    while len(text) - begin > 2 * _MOST:
        found = _BREAK.search(text, begin + _MOST)
        end = found.end() if found else len(text)
        yield text[begin:end].rstrip()
        begin = end
    if text[begin:].strip():
        yield text[begin:]
