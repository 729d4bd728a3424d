import json
import pickle
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.errors import UserError
from lmjax.prepare.stages import clean
from lmjax.prepare.stages.clean import Clean
from tests.prepare.stages import drive, texts

pytest.importorskip("ftfy")
pytest.importorskip("resiliparse")

PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style><script>var x = 1;</script>
</head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/b">About us</a></li></ul></nav>
<main><article><h1>The heading</h1><p>Fish &amp; chips cost &lt; 10&nbsp;&euro; here, as they did in
all the years before, and nobody minds.</p><p>A second paragraph, also of some length.</p>
<pre>code  {
   indented
}</pre></article></main><footer><p>Copyright 2020</p></footer></body></html>"""


def out(text: str, meta: str = "", **fields: object) -> str:
    stage = pickle.loads(pickle.dumps(Clean(min_characters=0, **fields)))
    table = drive.records([text, "other"], metas=[meta, ""])
    result = drive.check(table, stage(table))
    kept = dict(zip(result.kept["id"].to_pylist(), result.kept["text"].to_pylist(), strict=True))
    return kept.get("s/file#0", "")


def test_html_is_read_without_its_menus():
    text = out(PAGE)
    assert "Fish & chips cost < 10" in text and "second paragraph" in text
    assert "   indented" in text  # as preformatted
    for left_out in ("Home", "Copyright", "var x", "p {}", "<p>"):
        assert left_out not in text
    whole = out(PAGE, boilerplate="keep")
    assert "Home" in whole and "Copyright" in whole and "var x" not in whole


def test_what_html_is():
    assert out("if a < b and c > d: <x> stays") == "if a < b and c > d: <x> stays"
    assert out("<p>one</p>", json.dumps({"content_type": "text/html; charset=utf-8"})) == "one"
    assert out("<p>one</p>") == "<p>one</p>"  # a tag alone makes no page
    assert out("<p>one</p>", html="always") == "one"
    assert out(PAGE, html="never").startswith("<!DOCTYPE")
    assert out("<b>a</b><br><i>b</i> " * 5).split() == ["a", "b"] * 5
    code = "A page:\n<p>one</p><p>two</p><p>three</p><p>four</p>"
    assert out(code) == code  # text about html is no html
    assert clean.looks_like_html("  <?xml version='1.0'?>\n<!-- c -->\n<HTML lang=x>")


WRONG = {"cp1252": "naïve café \u2013 “señor” costs 5 €", "latin-1": "Ünïcödé façade Grüße"}


@pytest.mark.parametrize("codec", WRONG)
def test_text_that_was_decoded_wrongly_is_repaired_line_by_line(codec):
    # a few bytes have no character in cp1252: ftfy knows them as C1 controls
    good = WRONG[codec]
    bad = good.encode().decode(codec, "replace").replace("\ufffd", "\x9d")
    text = f"plain line\n{bad}\n{good}"
    fixed = clean.repair_encoding(text).split("\n")
    assert fixed[0] == "plain line"
    assert fixed[2] == good
    assert "Ã" not in fixed[1] and fixed[1].startswith(good[:8])
    assert out(text, encoding=False) != out(text)


def test_good_text_of_any_script_is_left_alone():
    for good in (
        "naïve café",
        "日本語のテキスト",
        "Привет, мир",
        "हिन्दी",
        "Ελληνικά",
        "“quoted” \u2013 …",
        "ÂME",
    ):
        assert out(good * 3) == good * 3


def test_control_characters_white_space_and_normal_form():
    assert out("a\x00b\x08c\x7fd\ufeffe\u200bf\xadg") == "abcdefg"
    assert out("क\u094dष \u200d x") == "क\u094dष \u200d x"  # joiners spell
    assert out("one\r\ntwo\rthree\u2028four") == "one\ntwo\nthree\nfour"
    assert out("\n\n  indented \t\n\n\n\nnext  two\u3000\n") == "  indented\n\nnext  two"
    assert out(" a  b\t\tc ", white_space="words") == " a b c".rstrip()
    assert out(" a  b \n\n\n", white_space="keep") == " a  b \n\n\n"
    assert out("e\u0301 ﬁ") == "é ﬁ"
    assert out("e\u0301 ﬁ", unicode="NFKC") == "é fi"
    assert out("e\u0301 ﬁ", unicode="") == "e\u0301 ﬁ"


def test_lengths_and_counts():
    table = drive.records(["", " \n\t ", "abc", "abcdef", "a\x00bcdefghijk", "e\u0301" * 8])
    result = drive.check(table, Clean(min_characters=4, max_characters=9)(table))
    assert result.kept["id"].to_pylist() == ["s/file#3", "s/file#5"]
    assert result.dropped["reason"].to_pylist() == ["empty", "empty", "too short", "too long"]
    assert result.dropped["detail"].to_pylist()[2:] == ["3 characters", "11 characters"]
    assert result.counts == {
        "control characters removed": 1,
        "normalised to NFC": 1,
        "white space normalised": 1,
    }


def test_is_its_own_fixed_point_and_equals_a_plain_pipeline_on_spoiled_plays():
    draw = random.Random(0)
    documents = []
    for text in texts.plays()[::30]:
        ways = [" \n", "\r\n", "\n\n\n\n", "\x00", "\u200b", "\t\n", "\xa0", "a\u0301"]
        for _ in range(6):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(ways) + text[at:]
        documents.append(text)
    table = drive.records(documents)
    once = Clean(html="never")(table)
    assert once.kept["text"].to_pylist() == [plain(text) for text in documents]
    again = Clean(html="never")(once.kept)
    assert again.kept.equals(once.kept) and not again.counts


def plain(text: str) -> str:
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    lines: list[str] = []
    for line in text.split("\n"):
        line = line.rstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n")


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["", "NFC", "NFKC"]))
def test_cleaning_twice_is_cleaning_once(text, form):
    table = drive.records([text])
    stage = Clean(html="never", encoding=False, unicode=form)
    once = drive.check(table, stage(table)).kept
    again = stage(once)
    assert again.kept.equals(once) and not again.counts


def test_what_a_library_fails_on_goes_to_quarantine(monkeypatch):
    def fail(text: str, **_: object) -> str:
        if "two" in text:
            raise RuntimeError("no tree")
        return text

    monkeypatch.setattr(clean, "read_html", fail)
    table = drive.records(["one", "two " * 99, "three"])
    result = drive.check(table, Clean(html="always")(table))
    assert result.kept["text"].to_pylist() == ["one", "three"]
    (row,) = result.quarantined.to_pylist()
    assert row["reason"] == "RuntimeError: no tree" and row["raw"] == ("two " * 99)[:200]


def test_bad_fields_are_named():
    with pytest.raises(UserError, match=r"html='atuo'.*Did you mean 'auto'"):
        Clean(html="atuo")


@pytest.mark.slow
def test_html_among_real_mails():
    bodies = texts.mail_bodies()
    table = drive.records(bodies)
    result = drive.check(table, Clean()(table))
    begin = ("<html", "<!doctype html")
    pages = [i for i, body in enumerate(bodies) if body.lstrip().lower().startswith(begin)]
    assert 500 < len(pages) <= result.counts["html read"] < 1200
    kept = dict(zip(result.kept["id"].to_pylist(), result.kept["text"].to_pylist(), strict=True))
    read = [kept.get(f"s/file#{i}", "") for i in pages]
    assert not any("</" in text.lower() for text in read)
    assert sum(len(text) > 20 for text in read) > 0.97 * len(pages)


def test_lengths_at_their_limits():
    table = drive.records(["a" * n for n in (0, 2, 3, 5, 6)])
    result = drive.check(table, Clean(min_characters=3, max_characters=5)(table))
    assert result.kept["text"].to_pylist() == ["aaa", "aaaaa"]
    assert result.dropped["reason"].to_pylist() == ["empty", "too short", "too long"]
    assert result.dropped["detail"].to_pylist() == ["0 characters", "2 characters", "6 characters"]
    assert len(Clean(max_characters=0)(table).kept) == 4


def test_a_page_that_is_all_menu_is_read_whole():
    page = "<html><body><nav><a href='/'>Home</a></nav><footer>The end</footer></body></html>"
    assert out(page).split() == ["Home", "The", "end"]
