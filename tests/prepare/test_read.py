"""Readers: what they find in dirty files, against what was put there."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmjax.errors import UserError
from lmjax.prepare.files import File, find
from lmjax.prepare.read.decode import Undecodable, decode
from lmjax.prepare.read.jsonl import Jsonl
from lmjax.prepare.read.mail import Email, Mbox
from lmjax.prepare.read.pdf import Pdf
from lmjax.prepare.read.sheet import Piece, Sheet
from lmjax.prepare.read.source import Source
from lmjax.prepare.read.table import Csv, Parquet
from lmjax.prepare.read.text import Lines, Text
from lmjax.prepare.read.unpack import Unpacked
from lmjax.prepare.read.web import Html, Warc
from tests.prepare.reading import put, read

# Decoding


@pytest.mark.parametrize(
    "data, declared, text, how",
    [
        (b"plain", None, "plain", ""),
        ("caf\xe9".encode(), "latin-1", "caf\xe9", ""),
        (b"\xef\xbb\xbfx", None, "x", ""),
        ("\xe9\u4e2d".encode("utf-16"), None, "\xe9\u4e2d", "decoded as utf-16-le, by its byte"),
        (b"\xff\xfe\x00\x00" + "x".encode("utf-32-le"), None, "x", "decoded as utf-32-le, by its"),
        (b"caf\xe9 \x80", "ISO-8859-1", "caf\xe9 \u20ac", "decoded as cp1252, declared"),
        (b"caf\xe9 \xe9\xe8", "nonsense", "caf\xe9 \xe9\xe8", "decoded as cp1252, guessed"),
        (b"\xd6\xd0\xb9\xfa", "gb2312", "\u4e2d\u56fd", "decoded as gb18030, declared"),
        (b"x" * 3000 + b"\xe2\x82", None, "x" * 3000 + "\ufffd", "invalid UTF-8 replaced"),
        (b"\\ud800\xff \xff\xff", "unicode_escape", None, "decoded as cp1252, guessed"),
        (b"x" * 100 + b"\xe9 \xe9", None, "x" * 100 + "\xe9 \xe9", "decoded as cp1252, guessed"),
        (b"x" * 4000 + b"\xe9 \xe9", None, "x" * 4000 + "\ufffd \ufffd", "invalid UTF-8 replaced"),
        (b"\xff\xff\xff", "base64", "\xff\xff\xff", "decoded as cp1252, guessed"),
    ],
)
def test_decode(data, declared, text, how):
    found, told = decode(data, declared)
    found.encode()
    assert told.startswith(how) and (text is None or found == text)


def test_binary_is_no_text():
    with pytest.raises(Undecodable, match="a zero at byte 1"):
        decode(b"x\0y")


# Compression

PACKED = {
    "gz": gzip.compress,
    "members.gz": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    "padded.gz": lambda data: gzip.compress(data) + bytes(512),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "plain": bytes,
}


@pytest.mark.parametrize("form", [*PACKED, "zst"])
@pytest.mark.parametrize("size", [-1, 777])
def test_unpacked(tmp_path, form, size):
    data = np.random.default_rng(0).choice(list(b"ab\n"), 200_000).astype(np.uint8).tobytes()
    pack = PACKED.get(form) or pytest.importorskip("zstandard").compress
    path = put(tmp_path, "x", pack(data))
    with path.open("rb") as raw:
        stream = Unpacked(raw)
        assert b"".join(iter(lambda: stream.read(size), b"")) == data
    assert (stream.broken, stream.offset) == ("", len(data))


@pytest.mark.parametrize("form", ["gz", "xz", "zst"])
def test_cut_off_in_the_middle(tmp_path, form):
    lines = [f"{i} {'x' * (i % 7)}" for i in np.random.default_rng(0).integers(0, 10**9, 20_000)]
    data = "\n".join(lines).encode()
    packed = (PACKED.get(form) or pytest.importorskip("zstandard").compress)(data)
    path = put(tmp_path, f"x.{form}", packed[: len(packed) // 2])
    good, ((number, offset, reason),), _ = read(Lines(), path)
    assert 3_000 < len(good) < 20_000 and [text for _, text, _ in good] == lines[: len(good)]
    assert number == len(good) and offset == sum(len(line) + 1 for line in lines[:number])
    assert "ends too early" in reason


def test_damaged_in_the_middle(tmp_path):
    data = os.urandom(400_000).hex().encode()
    packed = bytearray(gzip.compress(b"\n".join(data[i : i + 99] for i in range(0, 800_000, 99))))
    packed[len(packed) // 2 : len(packed) // 2 + 1000] = bytes(1000)
    good, ((_, _, reason),), _ = read(Lines(), put(tmp_path, "x.gz", bytes(packed)))
    assert len(good) > 1000 and "gzip is damaged" in reason


# Text


def test_text_and_lines(tmp_path):
    path = put(tmp_path, "a.txt", b"one\r\n\ntwo\0\nthr\xe9\xe9\n")
    assert read(Text(), path)[1] == [(0, 0, "binary: a zero at byte 9")]
    good, bad, counts = read(Lines(), path)
    assert [g[:2] for g in good] == [(0, "one"), (1, ""), (3, "thr\xe9\xe9")]
    assert bad == [(2, 6, "binary: a zero at byte 3")]
    assert counts == {"decoded as cp1252, guessed": 1}


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("target", [1, 7, 40, 333, 10**6])
def test_pieces_hold_each_line_once(tmp_path, target, end):
    rng = np.random.default_rng(target)
    lines = ["x" * n for n in rng.integers(0, 60, 50)] + ["last"]
    path = put(tmp_path, "a.txt", "\n".join(lines) + end)
    assert [g[:2] for g in read(Lines(), path, target)[0]] == list(enumerate(lines))
    (file,) = find(str(path))
    pieces = Lines().cut(file, target=target)
    assert len(pieces) <= max(1, path.stat().st_size / target) + 1
    assert target > 100 or len(pieces) > 10


# JSON


def test_jsonl(tmp_path):
    lines = [
        b'{"text": "a", "url": "u", "n": 1}',
        b'{"text": "b"',
        b"",
        b'{"txt": "c"}',
        b'{"text": null}',
        b'{"text": {"a": 1}}',
        b"[1]",
        b'{"text": "\\ud800"}',
        b'{"text": "caf\xe9 \xe9"}',
        b'\xef\xbb\xbf{"text": "mark"}',
        b'{"text": "z", "nan": NaN}',
        b'{"text": "last"}',
    ]
    good, bad, counts = read(Jsonl(), put(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert good == [
        (0, "a", {"url": "u", "n": 1}),
        (8, "caf\xe9 \xe9", {}),
        (9, "mark", {}),
        (11, "last", {}),
    ]
    assert [b[0] for b in bad] == [1, 3, 4, 5, 6, 7, 10]
    assert len(good) + len(bad) == len(lines) - 1
    for number, offset, _ in bad:
        assert offset == sum(len(line) + 1 for line in lines[:number])
    reasons = dict((b[0], b[2]) for b in bad)
    assert reasons[3] == "no field 'text'" and reasons[4] == "'text' is null, not text"
    assert reasons[5] == "'text' is an object, not text" and reasons[6] == "no JSON object"
    assert counts == {"decoded as cp1252, guessed": 1}
    kept = read(Jsonl(keep=("n",)), tmp_path / "a.jsonl")[0]
    assert kept[0] == (0, "a", {"n": 1})


@pytest.mark.parametrize("target", [50, 500])
def test_jsonl_in_pieces(tmp_path, target):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "y" * int(n)}) for n in rng.integers(0, 90, 80)]
    lines[3] = lines[50] = "{"
    path = put(tmp_path, "a.jsonl", "\n".join(lines))
    assert read(Jsonl(), path, target) == read(Jsonl(), path)


# Tables


@pytest.mark.parametrize("target", [0, 1, 3000])
def test_parquet(tmp_path, target):
    rows = [{"body": f"t{i}" * 30, "n": i, "x": None} for i in range(100)]
    rows[17]["body"] = None
    table = pa.Table.from_pylist(
        rows, schema=pa.schema({"body": "string", "n": "int64", "x": "string"})
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    good, bad, _ = read(Parquet(text="body"), tmp_path / "a.parquet", target)
    assert good == [(i, r["body"], {"n": i}) for i, r in enumerate(rows) if i != 17]
    assert bad == [(17, 17, "'body' is null, not text")]


def test_damaged_parquet(tmp_path):
    table = pa.table({"text": [os.urandom(50).hex() for _ in range(100)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    begin = pq.ParquetFile(path).metadata.row_group(4).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(data)
    good, ((number, _, reason),), counts = read(Parquet(), path)
    assert [g[0] for g in good] == [i for i in range(100) if not 40 <= i < 50]
    assert number == 40 and "damaged row group" in reason
    assert counts == {"rows lost in damaged row groups": 10}
    assert "no parquet" in read(Parquet(), put(tmp_path, "b.parquet", b"PAR1 no"))[1][0][2]


def test_csv_against_the_library(tmp_path):
    rng = np.random.default_rng(0)
    alphabet = list('ab,"\n x\u4e2d')
    rows = [
        ["".join(rng.choice(alphabet, rng.integers(0, 9))) for _ in range(3)] for _ in range(300)
    ]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["a", "text", "c"], *rows])
    good, bad, _ = read(Csv(keep=("a",)), path)
    assert not bad and [(g[1], g[2]) for g in good] == [(r[1], {"a": r[0]}) for r in rows]


def test_dirty_csv(tmp_path):
    lines = [
        b"n,text",
        b"1,good",
        b"2,too,many",
        b"3",
        b'4,"two',
        b'lines"',
        b'5,"never ended',
        b"6,caf\xe9 \xe9",
        b'7,"x"y',
        b"8,a\0b",
        b"",
        b'9,5" tall',
    ]
    good, bad, _ = read(Csv(), put(tmp_path, "a.csv", b"\n".join(lines)))
    assert [(g[1], g[2]["n"]) for g in good] == [
        ("good", "1"),
        ("two\nlines", "4"),
        ("caf\xe9 \xe9", "6"),
        ('5" tall', "9"),
    ]
    offsets = [sum(len(line) + 1 for line in lines[:i]) for i in (2, 3, 6, 8, 9)]
    assert [b[1] for b in bad] == offsets
    assert sorted([g[0] for g in good] + [b[0] for b in bad]) == list(range(9))
    twice = put(tmp_path, "c.csv", "n,text,n\n1,x,2\n")
    assert read(Csv(), twice)[0] == [(0, "x", {"n": "1", "n.2": "2"})]
    tabs = put(tmp_path, "b.tsv", "a\tx, y\n")
    assert read(Csv(names=("n", "text")), tabs)[0] == [(0, "x, y", {"n": "a"})]


# Files and formats


def test_find(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden/x.txt", "b/.x", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [file.name for file in find(str(tmp_path))]
    assert names == ["a.txt", "b/1.txt", "b/2.txt", "c.md"]
    assert [file.name for file in find(f"{tmp_path}/**/*.txt")] == names[:3]
    assert [file.name for file in find(f"{tmp_path}/b")] == ["1.txt", "2.txt"]
    assert [(f.name, f.size) for f in find(f"{tmp_path}/b/1.txt")] == [("1.txt", 7)]
    for path, message in [
        ("", "is empty"),
        (f"{tmp_path}/z", "nothing at"),
        (f"{tmp_path}/*.z", "no files"),
    ]:
        with pytest.raises(UserError, match=message):
            find(path)


def test_a_file_whose_name_is_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (tmp_path / name).write_text("x")
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    (file,) = find(str(tmp_path))
    sheet = Sheet("s")
    sheet.begin(file)
    for _ in Text().read(Piece(file=file), sheet):
        pass
    sheet.bad(1, 0, "a test", b"")
    result = sheet.take()
    assert result.kept["id"].to_pylist() == ["s/caf\\xe9.txt#0"]
    assert result.quarantined["file"].to_pylist() == ["caf\\xe9.txt"]


def test_format_by_suffix():
    names = {
        "a.txt": Text,
        "a.JSONL": Jsonl,
        "b.jsonl.gz": Jsonl,
        "c.ndjson.zst": Jsonl,
        "d.parquet": Parquet,
        "e.csv.bz2": Csv,
        "f.htm": Html,
        "CC-1.warc.gz": Warc,
        "g.eml": Email,
        "g.mbox.gz": Mbox,
        "h.pdf": Pdf,
    }
    source = Source(path="x")
    assert {name: type(source.format_of(name)) for name in names} == names
    assert source.format_of("README") is None
    assert Source(path="x", format="email").format_of("README") == Email()
    form = Jsonl(text="body")
    assert Source(path="x", format=form).format_of("a.txt") is form


def test_a_file_that_is_gone_is_counted(tmp_path):
    from lmjax.data.folder import Folder
    from lmjax.prepare.shelf import Shelf
    from lmjax.prepare.tasks import Read

    gone = File(path=str(tmp_path / "gone.txt"), name="gone.txt", size=1, version="")
    here = find(str(put(tmp_path, "here.txt", "x")))[0]
    odd = find(str(put(tmp_path, "here.odd", "x")))[0]
    task = Read(
        number=0,
        source="s",
        pieces=[(Piece(file=gone), Text()), (Piece(file=here), Text()), (Piece(file=odd), None)],
        shelf=Shelf(Folder(str(tmp_path / "out")), "key"),
    )
    outcome = task.run().outcomes["read"]
    assert (outcome["kept"], outcome["rows"]) == (1, 3)
    assert sorted(outcome["quarantined"]) == [
        "cannot be read: No such file or directory",
        "of no known format: set the source's format",
    ]
