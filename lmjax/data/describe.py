"""One batch of a run, with what is in it, for people and for programs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lmjax.core import Batch, TextDataset
from lmjax.data.origins import Origin, Range


def describe(
    data: TextDataset, number: int, *, batch_size: int, seed: int, rows: int | None = None
) -> dict[str, Any]:
    """Global batch `number` of a data set, as JSON can hold it.

    `sha256` is of the whole batch: every array's name, dtype, shape and bytes, by name;
    `fingerprint` is of what every batch is made of, where the data set tells it. Of the first
    `rows` rows (all where None): `example`, the number in the data set's sequence; `source` in a
    mixture; `pieces`, as `origins.Piece` and each with its text; `weightless`, the columns of
    weight 0; `padding`, the columns that hold no token of any document; `arrays`. Where the data
    set tells no origins, `pieces` and `padding` are None, and there is `text`; `source` is None but
    in a mixture.
    """
    data.check()
    batch = read_batch(data, number, batch_size=batch_size, seed=seed)
    origins: Any = None
    if hasattr(data, "origins"):
        by_batch = getattr(data, "order", "") == "continued"
        origins = data.origins(seed=seed, **({"batch_size": batch_size} if by_batch else {}))
    shown = []
    for row in range(batch_size if rows is None else min(rows, batch_size)):
        arrays = {name: value[row] for name, value in batch.items()}
        example = number * batch_size + row
        origin = None if origins is None else origins[example]
        told = _told(data, arrays, origin)
        weightless = _ranges(arrays["weights"] == 0) if "weights" in arrays else []
        values = {name: value.tolist() for name, value in arrays.items()}
        shown.append(
            {"row": row, "example": example, **told, "weightless": weightless, "arrays": values}
        )
    return {
        "batch": number,
        "batch_size": batch_size,
        "seed": seed,
        "fingerprint": getattr(data, "fingerprint", None),
        "sha256": digest(batch),
        "shapes": {name: list(value.shape) for name, value in batch.items()},
        "num_targets": int(batch["weights"].size) if "weights" in batch else None,
        "num_weightless": int((batch["weights"] == 0).sum()) if "weights" in batch else None,
        "rows": shown,
    }


def read_batch(data: TextDataset, number: int, *, batch_size: int, seed: int) -> Batch:
    """One global batch, all rows of it; read in this process, which changes no batch."""
    here: Any = data
    if "workers" in getattr(here, "__dataclass_fields__", ()):
        here = dataclasses.replace(here, workers=0)
    batches = here.batches(batch_size=batch_size, seed=seed, start=number)
    batch: Batch = next(batches)
    getattr(batches, "close", lambda: None)()
    return batch


def digest(batch: Batch) -> str:
    """Sha256 of every array's name, dtype, shape and bytes, by name."""
    found = hashlib.sha256()
    for name in sorted(batch):
        value = np.ascontiguousarray(batch[name])
        found.update(f"{name} {value.dtype.str} {value.shape} ".encode())
        found.update(value.tobytes())
    return found.hexdigest()


def spell(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of what `describe` found."""
    size, rows = found["batch_size"], found["rows"]
    first = found["batch"] * size
    shapes = ", ".join(f"{name} {shape}" for name, shape in found["shapes"].items())
    step = f"step {found['step']} trains on " if found.get("step") else ""
    yield (
        f"{step}batch {found['batch']}: examples {first} to {first + size - 1} of seed "
        f"{found['seed']}"
    )
    yield f"arrays: {shapes}"
    yield f"sha256: {found['sha256']}"
    if found["fingerprint"]:
        yield f"made of: {found['fingerprint']}"
    if found["num_targets"] is not None:
        yield f"targets of weight 0: {found['num_weightless']} of {found['num_targets']}"
    for row in rows:
        source = f", source {row['source']}" if row["source"] else ""
        yield f"row {row['row']}, example {row['example']}{source}"
        tokens = row["arrays"].get("tokens", [])
        for piece in row["pieces"] or ():
            begin, end = piece["columns"]
            characters = piece["characters"]
            place = f"characters {_span(characters)}, " if characters else ""
            yield (
                f"  columns {_span(piece['columns'])}: document {piece['document']}, {place}"
                f"tokens {_span(piece['tokens'])}, of {piece['name']}"
            )
            yield f"    text {piece['text']!r}"
            yield f"    ids {' '.join(map(str, tokens[begin:end]))}"
        if row["pieces"] is None:
            yield "  its data set does not tell where it comes from"
            yield f"  text {row['text']!r}"
            yield f"  ids {' '.join(map(str, tokens))}"
        if row["weightless"]:
            yield f"  weight 0: columns {', '.join(map(_span, row['weightless']))}"
        if row["padding"]:
            yield f"  padding: columns {', '.join(map(_span, row['padding']))}"
    if len(rows) < size:
        yield f"({size - len(rows)} more rows)"


def _told(
    data: TextDataset, arrays: Mapping[str, np.ndarray], origin: Origin | None
) -> dict[str, Any]:
    """Source, pieces and padding of one row."""
    if origin is None or origin.pieces is None:
        text = data.tokenizer.decode(arrays["tokens"]) if "tokens" in arrays else ""
        source = origin and origin.source
        return {"source": source, "pieces": None, "padding": None, "text": text}
    tokens = arrays["tokens"]
    pieces, free = [], np.ones(len(tokens), bool)
    for piece in origin.pieces:
        columns = slice(*piece.columns)
        free[columns] = False
        text = data.tokenizer.decode(tokens[columns])
        pieces.append({**dataclasses.asdict(piece), "text": text})
    return {"source": origin.source, "pieces": pieces, "padding": _ranges(free)}


def _ranges(chosen: np.ndarray) -> list[Range]:
    """The runs of True in a row, as (first, one past the last)."""
    columns = np.flatnonzero(chosen).tolist()
    groups = itertools.groupby(enumerate(columns), key=lambda pair: pair[1] - pair[0])
    runs = [[column for _, column in group] for _, group in groups]
    return [(run[0], run[-1] + 1) for run in runs]


def _span(of: Iterable[int]) -> str:
    return ":".join(map(str, of))
