import pickle

import pytest

from lmjax.config import build, call
from lmjax.data.augment.text import WordDropout
from lmjax.errors import UserError
from lmjax.prepare.stages.augment import Augment
from tests.prepare.stages import drive, texts


def blank(text: str, *, seed: int, index: int) -> str:
    if text == "no":
        raise UserError("it is not to be translated")
    return " " if text == "gone" else text


def test_a_record_is_augmented_alike_wherever_it_lies():
    documents = [*texts.plays()[:12], ""]
    table = drive.records(documents)
    stage = build(call(Augment, augmentation=call(WordDropout, rate=0.2), seed=3))
    stage = pickle.loads(pickle.dumps(stage))
    whole = drive.check(table, stage(table))
    assert whole.counts == {"texts changed": 12} and whole.kept["text"][12].as_py() == ""
    for before, after in zip(documents[:12], whole.kept["text"].to_pylist()[:12], strict=True):
        assert 0.7 < len(after.split()) / len(before.split()) < 0.9
    part = stage(table.slice(4, 3)).kept
    assert part["text"].to_pylist() == whole.kept["text"].to_pylist()[4:7]
    same = drive.records([documents[0]] * 2)
    assert len(set(stage(same).kept["text"].to_pylist())) == 2
    other = Augment(augmentation=WordDropout(rate=0.2), seed=4)(table)
    assert other.kept["text"][0] != whole.kept["text"][0]


def test_what_cannot_be_augmented_goes_to_quarantine():
    table = drive.records(["stays", "gone", "no"])
    result = drive.check(table, Augment(augmentation=blank)(table))
    assert result.kept["text"].to_pylist() == ["stays"]
    assert {row["raw"]: row["reason"] for row in result.quarantined.to_pylist()} == {
        "gone": "nothing is left of it",
        "no": "it is not to be translated",
    }
    with pytest.raises(UserError, match="is none: give WordDropout"):
        Augment(augmentation="word dropout")
