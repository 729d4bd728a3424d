import gzip
import json
import pickle
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmjax.errors import UserError
from lmjax.prepare.stages.decontaminate import Decontaminate
from tests.prepare.stages import drive, texts

WORD = re.compile(r"[^\W_]+")


def tuples(text: str, n: int) -> set[tuple[str, ...]]:
    found = WORD.findall(text.lower())
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


@pytest.fixture
def sets(tmp_path):
    """Two evaluation sets made of lines of plays, long and short."""
    draw = random.Random(0)
    lines = [line for piece in texts.plays()[::20] for line in piece.split("\n\n")]
    spans = [" ".join(line.split()[: draw.randint(3, 40)]) for line in lines]
    items = draw.sample([span for span in spans if len(span.split()) > 2], 60)
    rows = [
        {"id": "a b", "inner": {"question": q}, "choices": ["yes", q[::-1]]} for q in items[:40]
    ]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "tale.txt.gz").write_bytes(gzip.compress("\n\n".join(items[40:]).encode()))
    return tmp_path, items


@pytest.mark.parametrize("ngram", [13, 8])
def test_overlaps_equal_those_of_tuples_of_words(sets, ngram):
    folder, items = sets
    documents = [*texts.plays()[::10], "", "short"]
    table = drive.records(documents)
    stage = Decontaminate(paths=(str(folder),), ngram=ngram)
    stage = pickle.loads(pickle.dumps(stage))
    result = drive.check(table, stage(table))
    overlapping = {"quiz.jsonl": set(), "tale.txt.gz": set()}
    sizes = [min(len(WORD.findall(item)), ngram) for item in items]
    wanted = [tuples(item, size) for item, size in zip(items, sizes, strict=True)]
    for number, text in enumerate(documents):
        held = {size: tuples(text, size) for size in set(sizes) if size >= 8}
        for i, size in enumerate(sizes):
            if size >= 8 and wanted[i] & held[size]:
                overlapping["quiz.jsonl" if i < 40 else "tale.txt.gz"].add(f"s/file#{number}")
    expected = sorted({i for own in overlapping.values() for i in own})
    assert sorted(result.dropped["id"].to_pylist()) == expected
    assert 5 < len(expected) < len(documents) - 5
    assert set(result.dropped["reason"].to_pylist()) == {"contaminated"}
    assert result.counts == {
        "records overlapping": len(expected),
        "characters cut": 0,
        **{f"records overlapping {name}": len(own) for name, own in overlapping.items()},
    }
    for row in result.dropped.to_pylist():
        told, _, shared = row["detail"].partition(", first: ")
        for name, own in overlapping.items():
            assert (name in told) == (row["id"] in own)
        found = tuple(WORD.findall(shared.lower()))
        pairs = zip(sizes, wanted, strict=True)
        assert any(len(found) == size and found in held for size, held in pairs)
        assert found in tuples(documents[int(row["id"].partition("#")[2])], len(found))


ITEM = "What, then, is the capital of the small country that lies between France and Spain?"


def cut(document: str, tmp_path, **fields: object) -> dict[str, str]:
    (tmp_path / "e.json").write_text(json.dumps({"rows": [{"q": ITEM}, {"q": "too few words"}]}))
    table = drive.records([document])
    stage = Decontaminate(paths=(str(tmp_path / "e.json"),), mode="cut", **fields)
    result = drive.check(table, stage(table))
    if len(result.kept):
        assert result.counts["characters cut"] == len(document) - len(
            result.kept["text"][0].as_py()
        )
        return {"text": result.kept["text"][0].as_py()}
    return result.dropped.to_pylist()[0]


def test_what_is_shared_is_cut_with_a_window(tmp_path):
    spelled = ITEM.upper().replace(" ", "\n")  # case and white space are no way out
    before, after = "begin " * 100, " finish" * 100
    text = cut(f"{before}{spelled}{after}", tmp_path)["text"]
    assert set(text.split()) == {"begin", "finish"}
    first, second = text.split("\n\n")
    assert 600 - 200 - 6 <= len(first) + 1 <= 600 - 200
    assert 700 - 200 - 7 <= len(second) + 1 <= 700 - 200
    narrow = cut(f"{before}{spelled}{after}", tmp_path, window=0)["text"]
    assert narrow.split() == (before + after).split()


def test_small_pieces_go_and_many_pieces_drop(tmp_path):
    assert cut(ITEM, tmp_path)["reason"] == "contaminated throughout"
    assert cut("few words " + ITEM, tmp_path, window=0)["reason"] == "contaminated throughout"
    many = " ".join(["w" + " w" * 120, ITEM] * 12)
    assert cut(many, tmp_path, window=0)["reason"] == "contaminated in many places"
    assert cut(many, tmp_path, window=0, max_pieces=12)["text"].count("\n\n") == 11
    assert cut("nothing shared", tmp_path) == {"text": "nothing shared"}


def test_fields_choose_what_counts(tmp_path):
    other = "this long answer of many many words is not what was asked for by anyone here"
    pq.write_table(pa.table({"q": [ITEM], "a": [other]}), tmp_path / "e.parquet")
    table = drive.records([f"x {ITEM}", f"y {other}"])
    path = str(tmp_path / "e.parquet")
    assert len(Decontaminate(paths=(path,))(table).kept) == 0
    kept = Decontaminate(paths=(path,), fields=("q",))(table).kept
    assert kept["id"].to_pylist() == ["s/file#1"]
    assert Decontaminate(paths=(path,)).files() == [path]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="paths is empty"):
        Decontaminate()
    with pytest.raises(UserError, match="min_words=20"):
        Decontaminate(paths=("x",), min_words=20)
    with pytest.raises(UserError, match="Did you mean 'drop'"):
        Decontaminate(paths=("x",), mode="drops")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\nnot json')
    with pytest.raises(UserError, match=r"bad.jsonl cannot be read"):
        Decontaminate(paths=(str(tmp_path / "bad.jsonl"),))(drive.records(["x"]))
    (tmp_path / "few.txt").write_text("few words")
    with pytest.raises(UserError, match="no item has 8 words"):
        Decontaminate(paths=(str(tmp_path / "few.txt"),))(drive.records(["x"]))
