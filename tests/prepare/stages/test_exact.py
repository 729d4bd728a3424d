import pickle
import random

import pyarrow as pa
import pytest

from lmjax.errors import UserError
from lmjax.prepare.stages.exact import Exact
from tests.prepare.stages import drive, texts

SEPARATORS = {"paragraph": "\n\n", "line": "\n"}


def slow(table: pa.Table, unit: str, least: int) -> tuple[list[str], dict[str, str]]:
    """(texts that are kept, kept id by dropped id), one record after another."""
    seen: dict[str, str] = {}
    kept, dropped = [], {}
    for name, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
        if unit == "document":
            plain = " ".join(text.split())
            if plain in seen:
                dropped[name] = seen[plain]
            else:
                seen[plain] = name
                kept.append(text)
            continue
        left, first = [], None
        for piece in text.split(SEPARATORS[unit]):
            plain = " ".join(piece.split())
            if len(plain) >= least and plain in seen:
                first = first or seen[plain]
                continue
            seen.setdefault(plain, name)
            left.append(piece)
        out = SEPARATORS[unit].join(left)
        if first and not out.strip():
            dropped[name] = first
        else:
            kept.append(out)
    return kept, dropped


def repetitive(seed: int) -> list[str]:
    """Documents that share lines, paragraphs and all of their text."""
    draw = random.Random(seed)
    pieces = texts.plays()[:40]
    documents = []
    for _ in range(120):
        piece = draw.choice(pieces)
        blocks = piece.split("\n\n")
        documents.append(
            draw.choice(
                [
                    piece,
                    piece.replace(" ", "  "),
                    "\n\n".join(draw.sample(blocks, draw.randint(1, len(blocks)))),
                    "\n".join(draw.sample(piece.split("\n"), 4)) + "\n}",
                    "}",
                    "",
                ]
            )
        )
    return documents


@pytest.mark.parametrize("unit", ["document", "paragraph", "line"])
def test_equals_one_record_after_another(unit):
    table = drive.records(repetitive(3))
    stage = pickle.loads(pickle.dumps(Exact(unit=unit, min_characters=10)))
    kept, dropped = slow(table, unit, 10)
    for shards, exchanges in ((1, 1), (7, 5)):
        result = drive.run(stage, table, shards=shards, exchanges=exchanges)
        assert result.kept["text"].to_pylist() == kept
        found = {row["id"]: row["detail"] for row in result.dropped.to_pylist()}
        assert found == dropped
        assert len(dropped) >= 5
    if unit != "document":
        before = sum(map(len, table["text"].to_pylist()))
        after = sum(map(len, kept))
        assert result.counts[f"duplicate {unit}s"] > 50
        assert 0 < result.counts[f"characters in duplicate {unit}s"] <= before - after


def test_normalisation_decides_what_is_equal():
    given = drive.records(["One Two", "one  two", "one two"])
    for normalise, kept in (("none", 3), ("space", 2), ("case", 1)):
        assert len(drive.run(Exact(normalise=normalise), given).kept) == kept


def test_short_lines_stay():
    table = drive.records(["{\nlong enough to be cut\n}", "{\nlong enough to be cut\n}"])
    kept = drive.run(Exact(unit="line", min_characters=5), table).kept["text"].to_pylist()
    assert kept == ["{\nlong enough to be cut\n}", "{\n}"]


def test_a_line_that_a_record_repeats_is_cut_too():
    table = drive.records(["the same line\nthe same line\nanother"])
    kept = drive.run(Exact(unit="line", min_characters=5), table).kept["text"].to_pylist()
    assert kept == ["the same line\nanother"]


def test_bad_fields_are_named():
    with pytest.raises(UserError, match=r"unit='lines'.*Did you mean 'line'"):
        Exact(unit="lines")
    with pytest.raises(UserError, match=r"normalise='lower'"):
        Exact(normalise="lower")


def test_half_a_hash_makes_no_duplicate():
    """Two texts whose first 64 bits agree, as some two do among 10^10, are not the same."""
    table = drive.records(["one", "two", "two"])
    stage = Exact()
    rows = stage.keys(table.append_column("order", [[0, 1, 2]]))
    rows = rows.set_column(0, "key", pa.array([7, 7, 7], pa.uint64()))
    assert stage.reduce(rows).to_pylist() == [
        {"id": "s/file#2", "order": 2, "part": 0, "kept": "s/file#1"}
    ]
