"""Readers of pages, archives, mail and PDF: what they find, against what was put there."""

from __future__ import annotations

import gzip
import importlib.util
import mailbox
from email.message import EmailMessage

import pytest

from lmjax.errors import UserError
from lmjax.prepare.read.mail import Email, Mbox
from lmjax.prepare.read.pdf import Pdf
from lmjax.prepare.read.web import Html, Warc
from tests.prepare.reading import put, read

# Web


def page(body: bytes, *, head: str = "Content-Type: text/html", kind: str = "response") -> bytes:
    http = f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body
    told = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"WARC-Target-URI: http://x/\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
        f"Content-Type: application/http\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return told.encode() + http + b"\r\n\r\n"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_warc(tmp_path, pack):
    pytest.importorskip("fastwarc")
    latin = "Content-Type: text/html; charset=ISO-8859-1"
    chunked = "Content-Type: text/html\r\nTransfer-Encoding: chunked"
    packed = "Content-Type: text/html\r\nContent-Encoding: gzip"
    records = [
        page(b"<p>one"),
        page(b"", kind="request"),
        page(b"caf\xe9 \xe9", head=latin),
        page(b"\x89PNG", head="Content-Type: image/png"),
        page(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", head=chunked),
        page(gzip.compress(b"<p>packed"), head=packed),
        page(gzip.compress(b"<p>packed" * 99)[:-9], head=packed),
        page(b'<meta charset="shift_jis">\x93\xfa\x96{'),
    ]
    path = put(tmp_path, "a.warc.gz", b"".join(map(pack, records)))
    good, bad, counts = read(Warc(), path)
    texts = [
        "<p>one",
        "caf\xe9 \xe9",
        "abcde",
        "<p>packed",
        '<meta charset="shift_jis">\u65e5\u672c',
    ]
    assert [g[1] for g in good] == texts and [g[0] for g in good] == [0, 1, 2, 3, 5]
    told = {"content_type": "text/html", "url": "http://x/", "date": "2020-01-01T00:00:00Z"}
    assert good[0][2] == told
    assert [b[:2] for b in bad] == [(4, sum(len(pack(r)) for r in records[:6]))]
    assert counts["WARC records of type request passed over"] == 1
    assert counts["WARC responses that are no page passed over"] == 1
    whole = path.read_bytes()
    path.write_bytes(whole[: sum(len(pack(r)) for r in records[:5]) - 20])
    good, bad, _ = read(Warc(), path)
    assert [g[1] for g in good] == texts[:2] and [b[2] for b in bad] == ["a record that is cut off"]
    path.write_bytes(pack(records[0]) + b"rubbish\r\n\r\n" + pack(records[0]))
    good, bad, _ = read(Warc(), path)
    assert len(good) == 1 and len(bad) == 1 and "the rest of the file is lost" in bad[0][2]


def test_html(tmp_path):
    data = '<meta http-equiv="Content-Type" content="text/html; charset=windows-1251">\u043c'
    good, _, counts = read(Html(), put(tmp_path, "a.html", data.encode("cp1251")))
    assert good == [(0, data, {"content_type": "text/html"})]
    assert counts == {"decoded as cp1251, declared": 1}


# Mail


def test_mail(tmp_path):
    message = EmailMessage()
    message["Subject"], message["From"] = "Gr\xfc\xdfe", "a@b.example"
    message.set_content("plain \u20ac\n", cte="base64")
    message.add_alternative("<p>html", subtype="html")
    message.add_attachment("attached", filename="a.txt")
    path = put(tmp_path, "a.eml", bytes(message))
    good, bad, _ = read(Email(), path)
    assert good == [(0, "plain \u20ac\n", {"subject": "Gr\xfc\xdfe", "from": "a@b.example"})]
    assert not bad
    source = read(Email(body="source"), path)[0][0][1]
    assert bytes(message).decode().endswith(source) and source.startswith("--==")


@pytest.mark.parametrize(
    "data, text, kind",
    [
        (b"Subject: x\n\nbody\n", "body\n", None),
        (b"Subject: x\r\n\r\nbody\r\n", "body\r\n", None),
        (b"Content-Type: text/html\n\n<p>x", "<p>x", "text/html"),
        (b"Content-Type: text/plain; charset=latin-1\n\n\xe9", "\xe9", None),
        (b"Content-Type: text/plain; charset=nonsense\n\n\xe9\xe9\xe9", "\xe9\xe9\xe9", None),
        (
            b"Content-Transfer-Encoding: quoted-printable\nX: y\n\n=E9=E9=E9=\n",
            "\xe9\xe9\xe9",
            None,
        ),
        (b"Content-Transfer-Encoding: base64\nX: y\n\n!!!not base64", None, None),
        (b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\nin part\n", "in part", None),
        (b"Content-Type: multipart/mixed\n\nno boundary", "no boundary", None),
        (b"Subject: =?utf-8?b?broken?=\n\nx", "x", None),
    ],
)
def test_broken_mail_is_kept(tmp_path, data, text, kind):
    good, bad, _ = read(Email(), put(tmp_path, "a", data))
    assert len(good) == 1 and not bad
    assert text is None or good[0][1] == text
    assert good[0][2].get("content_type") == kind


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "no e-mail"),
        (b"only text\nwithout a header", "no e-mail"),
        (b"Content-Type: text/plain\n\na\0b", "binary"),
        (b"Content-Type: image/png\nX: y\n\nabc", "without text: image/png"),
        (
            b"Content-Type: multipart/mixed; boundary=b\n\n"
            b"--b\nContent-Type: image/png\n\nx\n--b--",
            "without text: multipart/mixed",
        ),
    ],
)
def test_no_mail_is_quarantined(tmp_path, data, reason):
    good, bad, _ = read(Email(), put(tmp_path, "a", data))
    assert not good and len(bad) == 1 and reason in bad[0][2]


def test_a_mailbox_against_the_library(tmp_path):
    box = mailbox.mbox(tmp_path / "a.mbox")
    bodies = [f"{i}\n\nFrom here on, 12:30 in 1999 it was\nFrom me\n" for i in range(5)]
    for body in bodies:
        message = EmailMessage()
        message["Subject"] = "x"
        message.set_content(body)
        box.add(message)
    box.flush()
    path = tmp_path / "a.mbox"
    good, bad, _ = read(Mbox(), path)
    assert [g[:2] for g in good] == list(enumerate(bodies)) and not bad
    assert {g[2]["subject"] for g in good} == {"x"}
    whole, count = path.read_bytes(), len(bodies)
    path.write_bytes(b"not yet\n\n" + whole.replace(b"Subject: x\n", b"\0broken", 1))
    good, bad, _ = read(Mbox(body="source"), path)
    assert len(good) + len(bad) == count + 1 and bad[0][:2] == (0, 0)
    assert "no mailbox" in bad[0][2] and whole[bad[1][1] - 9 :].startswith(b"From ")
    assert read(Mbox(), put(tmp_path, "b.mbox", b""))[:2] == ([], [])
    date = b"Mon Jan  1 00:00:00 2001\n"
    one = b"From a " + date + b"Subject: y\n\nsaid:\nFrom b " + date + b"\nFrom then on\n"
    ((_, text, _),), bad, _ = read(Mbox(), put(tmp_path, "c.mbox", one))  # neither begins one
    assert text == one.partition(b"\n\n")[2].decode().rstrip("\n") and not bad


# PDF


def test_pdf(tmp_path):
    path = put(tmp_path, "a.pdf", b"%PDF-1.4 broken")
    if importlib.util.find_spec("pypdf"):
        assert "no PDF that can be read" in read(Pdf(), path)[1][0][2]
    else:
        with pytest.raises(UserError, match="pip install pypdf"):
            read(Pdf(), path)
