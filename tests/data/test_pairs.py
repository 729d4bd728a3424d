"""Pairs: every format, what is refused and why, a split that none straddles."""

import csv
import gzip
import json

import pytest

from lmjax.data.pairs import Pair, read_pairs, split_pairs
from lmjax.errors import UserError

ROWS = [("a b", "A B", "one"), ('say "c"', "C, c", "one"), ("d", "D", "two")]


def write(folder, kind):
    path = folder / f"pairs.{kind}"
    if kind == "jsonl":
        lines = [
            json.dumps(dict(zip(("source", "target", "doc"), row, strict=True))) for row in ROWS
        ]
        path.write_text("\n".join(lines))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("source", "target", "doc"), *ROWS])
    elif kind == "tsv":
        path.write_text(
            "".join("\t".join(row) + "\n" for row in [("source", "target", "doc"), *ROWS])
        )
    else:
        data = "".join("\t".join(row) + "\n" for row in [("source", "target", "doc"), *ROWS])
        path.write_bytes(gzip.compress(data.encode()))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "tsv.gz"])
def test_every_format_gives_the_same_pairs(tmp_path, kind):
    pairs, refused = read_pairs(write(tmp_path, kind), document_field="doc")
    assert [(p.source, p.target, p.document) for p in pairs] == ROWS
    assert not refused


def test_two_files_of_lines(tmp_path):
    (tmp_path / "a").write_text("one\n\n three \n")
    (tmp_path / "b").write_text("eins\nzwei\ndrei\n")
    pairs, refused = read_pairs(str(tmp_path / "a"), target_path=str(tmp_path / "b"))
    assert [(p.source, p.target) for p in pairs] == [("one", "eins"), ("three", "drei")]
    assert [(one.reason, one.name.rpartition(":")[2]) for one in refused] == [("empty source", "2")]
    (tmp_path / "b").write_text("eins\n")
    with pytest.raises(UserError, match=r"has 3 lines and .* 1: line n of the second"):
        read_pairs(str(tmp_path / "a"), target_path=str(tmp_path / "b"))


def test_rows_that_are_no_pairs_are_refused_with_line_and_reason(tmp_path):
    path = tmp_path / "dirty.jsonl"
    lines = [
        '{"source": "a", "target": "A"}',
        '{"source": "b", "target": "  "}',
        '{"source": "c", "target": 7}',
        '{"source": "d", ',
        "[1]",
        "",
        '{"target": "E"}',
    ]
    path.write_text("\n".join(lines))
    pairs, refused = read_pairs(str(path))
    assert [p.source for p in pairs] == ["a"]
    assert [(one.name.rpartition(":")[2], one.reason) for one in refused] == [
        ("2", "empty target"),
        ("3", "no text in 'target'"),
        ("4", "no JSON"),
        ("5", "no JSON object"),
        ("7", "no text in 'source'"),
    ]
    table = tmp_path / "dirty.tsv"
    table.write_text("source\ttarget\na\tA\nb\n")
    pairs, refused = read_pairs(str(table))
    assert (len(pairs), refused[0].reason) == (1, "1 cells under 2 names")


def test_cells_hold_what_they_hold(tmp_path):
    """A mark at the beginning, separators of lines that are none, quotes, long letters."""
    long, limit = "x" * 200_000, csv.field_size_limit()
    text = f'\ufeffsource,target\r\n"a\n""b""",A\u2028B\n{long},C\nd\n'
    (tmp_path / "a.csv").write_text(text, "utf-8", newline="")
    pairs, refused = read_pairs(str(tmp_path / "a.csv"))
    assert [(p.source, p.target) for p in pairs] == [('a "b"', "A B"), (long, "C")]
    assert [p.name.rpartition(":")[2] for p in pairs] == ["2", "4"]
    assert [(one.name.rpartition(":")[2], one.reason) for one in refused] == [
        ("5", "1 cells under 2 names")
    ]
    assert csv.field_size_limit() == limit
    (tmp_path / "a.tsv").write_text('source\ttarget\n"a\tA"\n')
    assert [(p.source, p.target) for p in read_pairs(str(tmp_path / "a.tsv"))[0]] == [('"a', 'A"')]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "sorce\ttarget\n", "no column 'source' .* Did you mean 'sorce'"),
        ("a.jsonl", '{"src": "a", "target": "b"}', "no field 'source'"),
        ("a.txt", "a", "neither .jsonl nor .tsv nor .csv"),
    ],
)
def test_files_of_another_form_are_an_error(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(str(tmp_path / name))


def pairs_of(*rows):
    return [Pair(source=s, target=t, document=d, name=str(i)) for i, (s, t, d) in enumerate(rows)]


def test_no_document_and_no_duplicate_straddles_the_split():
    """Documents share half of their pairs with others, in another case too."""
    rows = [
        (f"Text {i % 60}" if i % 2 else f"text {i}", f"Ziel {i % 45}", f"document {i // 7}")
        for i in range(700)
    ]
    found = split_pairs(pairs_of(*rows), [], fraction=0.3)
    train, valid = ({p.document for p in half} for half in (found.train, found.valid))
    assert len(valid) > 10 and not train & valid
    for side in ("source", "target"):
        one, other = (
            {getattr(p, side).casefold() for p in half} for half in (found.train, found.valid)
        )
        assert not one & other
    for half in (found.train, found.valid):
        keys = [(p.source.casefold(), p.target.casefold()) for p in half]
        assert len(keys) == len(set(keys))
    dropped = found.counts["left out: there before"]
    dropped += found.counts["left out: held out in another document"]
    assert len(found.train) + len(found.valid) + dropped == 700


def test_more_pairs_leave_the_split_of_the_others_as_it_is():
    rows = [(f"s {i}", f"t {i}", f"d {i // 3}") for i in range(300)]
    few, many = (split_pairs(pairs_of(*rows[:n]), [], fraction=0.2) for n in (150, 300))
    assert {p.source for p in few.valid} <= {p.source for p in many.valid}
    assert {p.source for p in few.train} <= {p.source for p in many.train}


def test_numbers_are_spelled_out():
    pairs = dict((p.source, p.target) for p in read_pairs("numbers")[0])
    assert len(pairs) > 2000
    assert pairs["27"] == "twenty-seven"
    assert pairs["69223"] == "sixty-nine thousand two hundred and twenty-three"
    assert all(s.isdigit() and not any(c.isdigit() for c in t) for s, t in pairs.items())
