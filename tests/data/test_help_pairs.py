"""scripts/help_pairs.py: paragraphs of the same page and id, and what has no partner."""

import json
import runpy
from pathlib import Path

from lmjax.data.parallel import Parallel
from lmjax.data.vocabulary import Bytes

SCRIPT = Path(__file__).parents[2] / "scripts" / "help_pairs.py"
EN = """<html><body><p id="menu">no</p><h1 id="hd_1" dir="auto">Hide &amp; show</h1>
<p id="par_1">Choose <span class="emph">Format - <b>Rows</b></span>.
</p><p>nameless</p><p id="par_1">embedded again</p><p id="par_2">alone</p></body></html>"""
DE = """<html><body><p id="par_1">W\u00e4hlen Sie <span>Format \u2013 Zeilen</span>.</p>
<h1 id="hd_1">Aus- und einblenden</h1></body></html>"""


def test_pairs_share_page_and_id(tmp_path, capsys):
    for language, pages in (("en-US", {"a": EN, "b": EN}), ("de", {"a": DE})):
        for page, text in pages.items():
            path = tmp_path / language / "text" / "shared" / f"{page}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    runpy.run_path(str(SCRIPT))["main"](str(tmp_path), "en-US", "de")
    printed = capsys.readouterr().out
    expected = [
        ("Hide & show", "Aus- und einblenden"),
        ("Choose Format - Rows.", "W\u00e4hlen Sie Format \u2013 Zeilen."),
    ]
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [(row["source"], row["target"]) for row in rows] == expected
    assert {row["document"] for row in rows} == {"text/shared/a.html"}
    (tmp_path / "pairs.jsonl").write_text(printed)
    data = Parallel(
        path=str(tmp_path / "pairs.jsonl"),
        document_field="document",
        vocabulary=Bytes(),
        valid_fraction=0.0,
    )
    assert [(p.source, p.target) for p in data.pairs] == expected
