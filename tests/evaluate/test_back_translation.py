"""Back-translation: a pure function of each record, as a stage and as a hook."""

import dataclasses
import pickle

import pyarrow as pa
import pytest

from lmjax.data.augment.text import BackTranslation
from lmjax.errors import UserError
from lmjax.evaluate.back_translation import BackTranslate
from lmjax.generate.translator import Translator
from lmjax.prepare.stage import RECORD
from tests.generate.translating import write_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def records(*texts):
    rows = [
        {"id": f"s/f#{n}", "text": text, "source": "s", "meta": ""} for n, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=RECORD)


@pytest.mark.slow
def test_stage_adds_translations_whatever_the_shards_are(workdir):
    drawing = Translator(workdir=workdir, temperature=1.0)
    stage = pickle.loads(pickle.dumps(BackTranslate(forward=drawing, seed=5)))
    table = records("abc", " ", "hgf", "abc")
    whole = stage(table)
    assert whole.kept["text"].to_pylist() == ["abc", "hgf", "abc"]
    assert whole.dropped["reason"].to_pylist() == ["empty translation"]
    made = whole.kept["translation"].to_pylist()
    assert made[0] != made[2]  # another record, another draw
    halves = [stage(table.slice(0, 2)), stage(table.slice(2))]
    assert [x for half in halves for x in half.kept["translation"].to_pylist()] == made
    other = dataclasses.replace(stage, seed=6)(table)
    assert other.kept["translation"].to_pylist() != made
    assert any(name.endswith("config.json") for name in stage.files())
    assert len(stage.files()) > 1


@pytest.mark.slow
def test_there_and_back_is_a_paraphrase(workdir):
    greedy = Translator(workdir=workdir)
    table = records("abc", "hgf")
    stage = BackTranslate(forward=greedy, back=greedy, replace=True)
    expected = [greedy(greedy(text)) for text in ("abc", "hgf")]
    assert stage(table).kept["text"].to_pylist() == expected
    hook = BackTranslation(forward=greedy, back=greedy)
    assert hook("abc", seed=0, index=0) == expected[0]


def test_a_wrong_seed_is_refused():
    with pytest.raises(UserError, match="seed is -1"):
        BackTranslate(forward=Translator(workdir="runs/x"), seed=-1)
