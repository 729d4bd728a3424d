"""What a token store holds, for people and for programs: counts, damage, samples, a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data.remote import is_remote
from lmjax.data.store import PARTS, Store, find_store
from lmjax.errors import UserError

_BINS_PER_OCTAVE = 2
_SAMPLE_TOKENS = 64
PICTURE = "document_lengths.png"


def find_stores(path: str) -> list[str]:
    """The stores of a path: its training and validation splits, or the one that it is itself."""
    found = []
    for split in ("train", "valid"):
        try:
            folder = find_store(path, split)
        except UserError:
            if split == "train":
                raise
            continue
        if folder not in found:
            found.append(folder)
    return found


def survey(store: Store, *, samples: int = 3) -> dict[str, Any]:
    """Reads all of a store, as JSON can hold it.

    `damaged` lists what is wrong with files, each by its name; `sources` has documents, tokens and
    the quantiles of their lengths; `samples` are beginnings of documents, evenly spread over the
    store; `lengths` is a histogram: the least length of each bin, and documents by source.
    """
    manifest = store.manifest
    damaged = list(store.verify())
    found: dict[str, Any] = {
        "path": store.path,
        "fingerprint": store.fingerprint,
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "vocab_size": manifest["vocab_size"],
        "dtype": manifest["dtype"],
        "shards": len(manifest["shards"]),
        "files": len(PARTS) * len(manifest["shards"]),
        "bytes": sum(s["files"][part]["bytes"] for s in manifest["shards"] for part in PARTS),
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "damaged": damaged,
    }
    if damaged:
        return found
    shards = range(len(manifest["shards"]))
    sizes = np.concatenate([np.diff(store.starts(shard)) for shard in shards])
    source_of = np.concatenate([store.source_of(shard) for shard in shards])
    edges = _edges(int(sizes.max(initial=1)))
    lengths, sources = {}, {}
    for number, name in enumerate(store.sources):
        own = sizes[source_of == number]
        lengths[name] = np.histogram(own, [*edges, math.inf])[0].tolist()
        quantiles = np.quantile(own, (0, 0.5, 0.95, 1)).astype(int).tolist() if len(own) else []
        sources[name] = {**manifest["sources"][name], "min/median/95 %/max": quantiles}
    numbers = np.linspace(0, store.num_documents - 1, min(samples, store.num_documents))
    found |= {
        "sources": sources,
        "lengths": {"least": edges, "documents": lengths},
        "samples": [_sample(store, int(number)) for number in numbers],
    }
    return found


def spell_survey(found: dict[str, Any]) -> Iterator[str]:
    """The lines of a survey."""
    yield (
        f"{found['path']}: {found['documents']:,} documents, {found['tokens']:,} tokens "
        f"({found['dtype']}, vocabulary of {found['vocab_size']:,}) in {found['shards']} shards"
    )
    yield f"  fingerprint {found['fingerprint']}"
    if found["damaged"]:
        yield from (f"  damaged: {text}" for text in found["damaged"])
        return
    yield f"  checked: {found['files']} files of {found['bytes']:,} bytes are as they were written"
    yield "  documents        tokens   share  min/median/95 %/max  source"
    for name, told in found["sources"].items():
        share = 100 * told["tokens"] / max(1, found["tokens"])
        spread, counts = "/".join(map(str, told["min/median/95 %/max"])), told["documents"]
        yield f"  {counts:>9,} {told['tokens']:>13,} {share:>6.2f}%  {spread:>19}  {name}"
    for sample in found["samples"]:
        yield f"  document {sample['document']}, {sample['tokens']} tokens: {sample['name']}"
        yield f"    {sample['text']!r}"


def draw_lengths(found: dict[str, Any], path: str | Path) -> None:
    """Writes a PNG: how many documents have which number of tokens, by source."""
    import vl_convert

    least, below = found["lengths"]["least"], np.zeros(len(found["lengths"]["least"]), int)
    ends = [*least[1:], math.ceil(least[-1] * 2 ** (1 / _BINS_PER_OCTAVE))]
    values = []
    for name, counts in found["lengths"]["documents"].items():
        above = below + counts  # stacked here: Vega-Lite does not stack bars that have two ends
        values += [
            {"tokens": low, "end": end, "documents": int(bottom), "top": int(top), "source": name}
            for low, end, bottom, top in zip(least, ends, below, above, strict=True)
            if top > bottom
        ]
        below = above
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "title": {
            "text": f"{found['documents']:,} documents, {found['tokens']:,} tokens",
            "anchor": "start",
            "fontSize": 16,
        },
        "width": 640,
        "height": 320,
        "data": {"values": values},
        "mark": {"type": "rect", "stroke": "white", "strokeWidth": 0.5},
        "encoding": {
            "x": {
                "field": "tokens",
                "type": "quantitative",
                "scale": {"type": "log", "base": 2, "nice": False},
                "axis": {"format": "~s", "tickCount": 12},
                "title": "tokens in a document, its end included",
            },
            "x2": {"field": "end"},
            "y": {
                "field": "documents",
                "type": "quantitative",
                "title": "documents",
                "scale": {"domainMin": 0},
                "axis": {"format": "~s", "tickMinStep": 1},
            },
            "y2": {"field": "top"},
            "color": {"field": "source", "type": "nominal", "title": None},
        },
        "config": {"axis": {"labelFontSize": 12, "titleFontSize": 12, "gridColor": "#eee"}},
    }
    Path(path).write_bytes(vl_convert.vegalite_to_png(json.dumps(spec), scale=1.5))


def picture_path(store: Store) -> Path:
    """Where the picture of a store goes: into its folder, or here where that cannot be written."""
    beside = not is_remote(store.path) and os.access(store.path, os.W_OK)
    return Path(store.path, PICTURE) if beside else Path(PICTURE)


def _edges(longest: int) -> list[int]:
    octaves = math.ceil(math.log2(max(2, longest + 1)))
    exact = 2.0 ** (np.arange(octaves * _BINS_PER_OCTAVE) / _BINS_PER_OCTAVE)
    return sorted({math.ceil(edge) for edge in exact})


def _sample(store: Store, number: int) -> dict[str, Any]:
    name, source, first, end = store.document(number)
    ids = store.read(first, min(end, first + _SAMPLE_TOKENS))
    text = store.tokenizer.decode(ids)
    told = {"document": number, "name": name, "source": source, "tokens": end - first}
    return {**told, "text": text, "ids": ids.tolist()}
