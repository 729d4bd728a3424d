"""What a reader makes of a file."""

import json
from pathlib import Path

from lmjax.prepare.files import find
from lmjax.prepare.read.sheet import Piece, Sheet


def read(form, path: Path, target: int = 0):
    """(number, text, meta) of each record, (number, offset, reason) of each bad one, counts."""
    (file,) = find(str(path))
    pieces = form.cut(file, target=target) if target else [Piece(file=file)]
    good, bad, counts = [], [], {}
    for piece in pieces:
        sheet = Sheet("s")
        sheet.begin(file)
        for _ in form.read(piece, sheet):
            pass
        result = sheet.take()
        for row in result.kept.to_pylist():
            name, _, number = row["id"].rpartition("#")
            assert (name, row["source"]) == (f"s/{file.name}", "s")
            good.append((int(number), row["text"], json.loads(row["meta"] or "{}")))
        for row in result.quarantined.to_pylist():
            assert row["file"] == file.name
            bad.append((int(row["id"].rpartition("#")[2]), row["offset"], row["reason"]))
        counts |= result.counts
    return good, bad, counts


def put(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path
