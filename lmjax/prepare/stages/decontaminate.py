"""Records that overlap evaluation sets: found by n-grams of words, dropped or cut.

Shape legend: W words, G n-grams, E n-grams of the evaluation sets.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.files import File, find
from lmjax.prepare.stage import Result, judged, with_column
from lmjax.prepare.stages import words

_BITS = 22  # of a hash, that are looked up in a table before it is searched for


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Drops, or cuts, what shares n words in a row with an evaluation set.

    Source: Brown et al. (GPT-3), arXiv:2005.14165, appendix C. Departures: n-grams that stand in
    many documents count as all others do; what a document is cut into stays one record. Items of
    fewer than `ngram` words, but of `min_words` at least, are looked for whole. Case, punctuation
    and white space are ignored. What is dropped is listed with the first n-gram that it shares.

    Args:
      paths: files, folders or globs of evaluation sets: .jsonl and .json (every string in an item,
        or those of `fields`), .txt (paragraphs), .parquet; .gz of the first three.
      ngram: 13 words in a row, as in the paper; 8 finds more, and more that is chance.
      min_words: shorter items are looked for nowhere.
      mode: "drop"; or "cut", which takes out what is shared, with `window` characters around it.
      window: as many on each side; the word that they end in goes whole.
      min_piece: shorter pieces between cuts go too.
      max_pieces: a document that is cut into more is dropped.
      fields: names of the strings of an item that count, at any depth; () for all.
    """

    paths: Sequence[str] = ()
    ngram: int = 13
    min_words: int = 8
    mode: Literal["drop", "cut"] = "drop"
    window: int = 200
    min_piece: int = 200
    max_pieces: int = 10
    fields: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("drop", "cut"):
            raise UserError(f"mode={self.mode!r}." + did_you_mean(self.mode, ("drop", "cut")))
        if not 1 <= self.min_words <= self.ngram:
            raise UserError(
                f"min_words={self.min_words} must lie between 1 and ngram={self.ngram}."
            )
        if not self.paths:
            raise UserError("paths is empty: name the files of the evaluation sets.")

    def files(self) -> list[str]:
        """Paths of the evaluation sets' files."""
        return [file.path for path in self.paths for file in find(path)]

    def __call__(self, records: pa.Table) -> Result:
        """Judges each record; counts the records that overlap each file."""
        index = _index(tuple(self.paths), self.ngram, self.min_words, tuple(self.fields))
        counts = {"records overlapping": 0, "characters cut": 0}
        counts |= {f"records overlapping {name}": 0 for name in index.names}
        texts: list[str] = records["text"].to_pylist()
        reasons: list[str | None] = [None] * len(texts)
        details: list[str | None] = [None] * len(texts)
        for piece in words.chunks(texts):
            found = words.normal_words(texts[piece])
            for i, spans, sources in index.overlaps(found):
                row = piece.start + i
                names = [index.names[source] for source in sources]
                first = " ".join(texts[row][slice(*spans[0].tolist())].split())
                details[row] = f"{len(spans)} n-grams of {', '.join(names)}, first: {first}"
                for name in ("records overlapping", *(f"records overlapping {n}" for n in names)):
                    counts[name] += 1
                if self.mode == "drop":
                    reasons[row] = "contaminated"
                    continue
                pieces = self._pieces(texts[row], spans)
                if not pieces:
                    reasons[row] = "contaminated throughout"
                elif len(pieces) > self.max_pieces:
                    reasons[row] = "contaminated in many places"
                else:
                    left = "\n\n".join(pieces)
                    counts["characters cut"] += len(texts[row]) - len(left)
                    texts[row] = left
        if self.mode == "cut":
            records = with_column(records, "text", pa.array(texts, pa.large_string()))
        return judged(records, reasons, details=details, counts=counts)

    def _pieces(self, text: str, spans: np.ndarray) -> list[str]:
        pieces, start = [], 0
        for begin, end in spans.tolist():
            begin, end = max(begin - self.window, 0), min(end + self.window, len(text))
            while begin > 0 and not text[begin - 1].isspace():
                begin -= 1
            while end < len(text) and not text[end].isspace():
                end += 1
            if begin > start:
                pieces.append(text[start:begin].strip())
            start = max(start, end)
        pieces.append(text[start:].strip())
        return [piece for piece in pieces if piece and len(piece) >= self.min_piece]


@dataclass(frozen=True)
class Index:
    """The n-grams of evaluation sets.

    Attributes:
      names: of the files.
      grams: by length n: sorted hashes_E, which file each is of (the first that has it), and a
        table of the leading bits that any hash has.
    """

    names: Sequence[str]
    grams: Mapping[int, tuple[np.ndarray, np.ndarray, np.ndarray]]

    def overlaps(self, found: words.Words) -> Iterator[tuple[int, np.ndarray, list[int]]]:
        """Texts that share n-grams: (number, [begin, end] in characters of each, their files)."""
        hits: dict[int, list[tuple[int, int, int]]] = {}
        ends_W = found.starts_W + found.lengths_W
        for n, (hashes_E, sources_E, table) in self.grams.items():
            hashes_G, offsets = words.ngrams(found.hashes_W, found.offsets_N1, n)
            maybe = np.flatnonzero(table[hashes_G >> np.uint64(64 - _BITS)])
            place = np.minimum(np.searchsorted(hashes_E, hashes_G[maybe]), len(hashes_E) - 1)
            sure = hashes_E[place] == hashes_G[maybe]
            at_G, source = maybe[sure], sources_E[place[sure]]
            text = np.searchsorted(offsets, at_G, side="right") - 1
            first = found.offsets_N1[text] + at_G - offsets[text]
            spans = zip(
                text.tolist(),
                found.starts_W[first].tolist(),
                ends_W[first + n - 1].tolist(),
                source.tolist(),
                strict=True,
            )
            for number, begin, end, of in spans:
                hits.setdefault(number, []).append((begin, end, of))
        for number in sorted(hits):
            every = sorted(hits[number])
            yield number, np.array([hit[:2] for hit in every]), sorted({hit[2] for hit in every})


@functools.lru_cache(maxsize=4)
def _index(paths: Sequence[str], ngram: int, min_words: int, fields: Sequence[str]) -> Index:
    files = [file for path in paths for file in find(path)]
    found: dict[int, list[tuple[np.ndarray, int]]] = {}
    for source, file in enumerate(files):
        items = list(_items(file, fields))
        for piece in words.chunks(items):
            for n, hashes_G in _grams(items[piece], ngram, min_words):
                found.setdefault(n, []).append((hashes_G, source))
    grams = {}
    for n, parts in sorted(found.items()):
        hashes = np.concatenate([part for part, _ in parts])
        if not len(hashes):
            continue
        sources = np.repeat([source for _, source in parts], [len(part) for part, _ in parts])
        hashes_E, first = np.unique(hashes, return_index=True)
        table = np.zeros(1 << _BITS, bool)
        table[hashes_E >> np.uint64(64 - _BITS)] = True
        grams[n] = hashes_E, sources[first], table
    if not grams:
        raise UserError(
            f"{', '.join(paths)}: no item has {min_words} words; lower min_words or check fields."
        )
    return Index([file.name for file in files], grams)


def _grams(texts: Sequence[str], ngram: int, min_words: int) -> Iterator[tuple[int, np.ndarray]]:
    """(n, hashes): of long texts every run of `ngram` words, of shorter ones all words."""
    found = words.normal_words(texts)
    yield ngram, words.ngrams(found.hashes_W, found.offsets_N1, ngram)[0]
    sizes = np.diff(found.offsets_N1)
    for n in range(min_words, ngram):
        chosen = np.flatnonzero(sizes == n)
        if len(chosen):
            at = words.positions(found.offsets_N1[chosen], sizes[chosen])
            yield n, words.ngrams(found.hashes_W[at], np.arange(len(chosen) + 1) * n, n)[0]


def _items(file: File, fields: Sequence[str]) -> Iterator[str]:
    """The texts of an evaluation set's file; raises UserError for what cannot be read."""
    name = file.name.removesuffix(".gz")
    kind = PurePath(name).suffix
    if kind not in (".jsonl", ".json", ".txt", ".parquet"):
        raise UserError(f"{file.path}: evaluation sets are .jsonl, .json, .txt or .parquet files.")
    with file.open() as stream:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            for row in pq.read_table(stream).to_pylist():
                yield from _strings(row, fields, not fields)
            return
        raw = stream.read()
    try:
        text = (gzip.decompress(raw) if name != file.name else raw).decode("utf-8-sig")
        if kind == ".txt":
            yield from text.split("\n\n")
        elif kind == ".json":
            yield from _strings(json.loads(text), fields, not fields)
        else:
            for line in text.split("\n"):
                if line.strip():
                    yield from _strings(json.loads(line), fields, not fields)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file.path} cannot be read: {error}.") from error


def _strings(value: Any, fields: Sequence[str], wanted: bool) -> Iterator[str]:
    if isinstance(value, str):
        if wanted:
            yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, fields, wanted or key in fields)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner, fields, wanted)
