"""How the input is cut into tasks: by the files alone, whoever runs them and however many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmjax.errors import UserError
from lmjax.prepare.backends import Backend
from lmjax.prepare.files import find
from lmjax.prepare.read.sheet import Piece
from lmjax.prepare.read.source import Cuttable, Format, Source
from lmjax.prepare.read.unpack import SUFFIXES
from lmjax.prepare.shelf import Shelf
from lmjax.prepare.tasks import Cut, Read

_LARGE = 1.5  # times the bytes of a shard: a larger file is cut
_PACKED = 4  # times as many bytes as it has, roughly, does a compressed file hold


def plan_reading(
    sources: Mapping[str, Source], shard_bytes: int, shelf: Shelf, engine: Backend
) -> list[Read]:
    """The tasks that read all sources, in the order of their records.

    Files follow each other by source and name; small ones share a task, large ones are cut where
    their format allows it. Raises UserError where no file of a source has a format.
    """
    found: list[tuple[str, Piece, Format | None]] = []
    for name, source in sources.items():
        files = find(source.path)
        forms = [source.format_of(file.name) for file in files]
        if not any(forms):
            raise UserError(
                f"sources.{name}: no file at {source.path!r} has a suffix that tells its format "
                f"(the first is {files[0].name!r}). Set its format, as format='text'."
            )
        found += [(name, Piece(file=file), form) for file, form in zip(files, forms, strict=True)]
    cuts = [
        Cut(number=i, piece=piece, form=form, target=shard_bytes, shelf=shelf)
        for i, (_, piece, form) in enumerate(found)
        if piece.file.size > shard_bytes * _LARGE and isinstance(form, Cuttable)
    ]
    numbers = {cut.number for cut in cuts}
    told = shelf.folder.names("cut-*.json")
    spare = [name for name in told if int(name[len("cut-") : -len(".json")]) not in numbers]
    shelf.folder.remove(spare)  # of files that are large no more
    done = zip(cuts, engine.map(cuts), strict=True) if cuts else ()
    parts = {cut.number: each.outcomes["cut"]["pieces"] for cut, each in done}
    tasks: list[Read] = []
    batch: list[tuple[Piece, Format | None]] = []
    size = 0

    def close(source: str) -> None:
        nonlocal size
        if batch:
            number = len(tasks)
            tasks.append(Read(number=number, source=source, pieces=tuple(batch), shelf=shelf))
        batch.clear()
        size = 0

    last = ""
    for i, (name, piece, form) in enumerate(found):
        if name != last:
            close(last)
        last = name
        if i in parts:
            close(name)
            for begin, end, first in parts[i]:
                batch.append((Piece(file=piece.file, begin=begin, end=end, first=first), form))
                close(name)
            continue
        bytes_ = piece.file.size * (_PACKED if piece.file.name.endswith(SUFFIXES) else 1)
        if size and size + bytes_ > shard_bytes:
            close(name)
        batch.append((piece, form))
        size += bytes_
    close(last)
    return tasks


def files_of(tasks: Sequence[Read]) -> dict[str, dict[str, int]]:
    """How many files, and bytes in them, the tasks read of each source."""
    files = {(task.source, piece.file) for task in tasks for piece, _ in task.pieces}
    told: dict[str, dict[str, int]] = {}
    for source, file in files:
        held = told.setdefault(source, {"files": 0, "bytes": 0})
        held["files"] += 1
        held["bytes"] += file.size
    return told
