"""Data sets of every kind can be mixed, each with its own kind; others are told apart."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.core import Batch, Dataset
from lmjax.data.describe import describe, spell
from lmjax.data.dialogue import Dialogue
from lmjax.data.images import Images
from lmjax.data.labelled_text import LabelledText
from lmjax.data.masked import Masked
from lmjax.data.mixture import Mixture, _seed_for
from lmjax.data.parallel import Parallel
from lmjax.data.preferences import Preferences
from lmjax.data.table import Table
from lmjax.data.text import Text
from lmjax.data.vocabulary import BPE, Bytes, Characters, Pretrained, Shared
from lmjax.errors import UserError
from tests.data.chat_cases import SPECIAL
from tests.data.test_chat import REFERENCE


def conversations(folder: Path) -> tuple[Dialogue, Text]:
    """Conversations, and plain text that is replayed beside them."""
    if importlib.util.find_spec("jinja2") is None and not os.environ.get("CI"):
        pytest.skip("needs jinja2")
    (folder / "tokenizer.json").write_text(REFERENCE["tokenizer"])
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    (folder / "a.txt").write_text("".join(f"line {i}\n" for i in range(300)))
    vocabulary = Pretrained(path=str(folder))
    talk = Dialogue(path="made", vocabulary=vocabulary, template="plain", length=145)
    return talk, Text(path=str(folder / "a.txt"), length=145, vocabulary=Shared(of=talk))


def talk_and_text(folder: Path) -> Mixture:
    talk, plain = conversations(folder)
    sources = {"talk": talk, "text": plain}
    return Mixture(sources=sources, weights={"talk": 3, "text": 1}, leave_out=("target_bytes",))


def labelled(folder: Path) -> Mixture:
    (folder / "b.csv").write_text(
        "text,label\n" + "".join(f"row {i},{('negative', 'positive')[i % 2]}\n" for i in range(30))
    )
    made = LabelledText(path="made", length=24)
    other = replace(made, path=str(folder / "b.csv"))
    return Mixture(sources={"made": made, "b": other}, weights={"made": 1, "b": 2})


def preferences(_: Path) -> Mixture:
    cut = Preferences(length=60)
    whole = replace(cut, too_long="drop", valid_fraction=0.5)
    return Mixture(sources={"cut": cut, "whole": whole}, weights={"cut": 5, "whole": 2})


def parallel(_: Path) -> Mixture:
    there = Parallel(vocabulary=BPE(vocab_size=300), length=32)
    back = replace(there, vocabulary=Shared(of=there), reverse=True)
    return Mixture(sources={"there": there, "back": back}, weights={"there": 1, "back": 1})


def images(_: Path) -> Mixture:
    one = Images(path="glyphs")
    other = replace(one, valid_fraction=0.5)
    return Mixture(sources={"one": one, "other": other}, weights={"one": 1, "other": 4})


def tables(_: Path) -> Mixture:
    train = Table(path="made:germancredit", target="creditability")
    other = replace(train, split="valid")
    return Mixture(sources={"train": train, "other": other}, weights={"train": 2, "other": 1})


def masked(folder: Path) -> Mixture:
    (folder / "c.txt").write_text("some words and others " * 40)
    one = Masked(of=Text(path=str(folder / "c.txt"), length=16, vocabulary=Bytes()))
    other = replace(one, masked_fraction=0.4)
    return Mixture(sources={"one": one, "other": other}, weights={"one": 1, "other": 1})


KINDS = (talk_and_text, labelled, preferences, parallel, images, tables, masked)


def take(data: Any, count: int, **options: Any) -> list[Batch]:
    batches = data.batches(**{"batch_size": 4, "seed": 5} | options)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_each_source_gives_its_share_of_its_own_examples(
    kind: Callable[[Path], Mixture], tmp_path: Path
) -> None:
    mixture = kind(tmp_path)
    checked: Dataset = mixture
    checked.check()
    whole = sum(mixture.weights.values())
    own = {
        name: source.stacked(seed=_seed_for(5, name)) for name, source in mixture.sources.items()
    }
    counts, told = dict.fromkeys(own, 0), mixture.origins(seed=5)
    batches = take(mixture, 12)
    for number, (batch, row) in enumerate(itertools.product(batches, range(4)), start=1):
        assert set(batch) == set(mixture.example)
        for name, shape in mixture.example.items():
            assert (batch[name].shape[1:], batch[name].dtype) == (shape.shape, shape.dtype)
        source = told[number - 1].source
        expected = own[source].rows([counts[source]])
        for name, value in batch.items():
            np.testing.assert_array_equal(value[row], expected[name][0])
        counts[source] += 1
        for name, weight in mixture.weights.items():
            assert abs(counts[name] - number * weight / whole) <= 1
    each = (source.epoch_batches(batch_size=4) for source in mixture.sources.values())
    epoch = mixture.epoch_batches(batch_size=4)
    for batch, other in zip(epoch, itertools.chain.from_iterable(each), strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(other[name], value)


@pytest.mark.parametrize("kind", [labelled, preferences])
def test_wherever_and_however_it_is_read(kind: Callable[[Path], Mixture], tmp_path: Path) -> None:
    mixture = kind(tmp_path)
    whole = take(mixture, 9)
    for start in range(9):
        parts = [take(mixture, 1, start=start, shard=i, num_shards=2)[0] for i in range(2)]
        for name, value in whole[start].items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_nothing(kind: Callable[[Path], Mixture], tmp_path: Path) -> None:
    mixture = kind(tmp_path)
    for batch, other in zip(take(mixture, 5), take(replace(mixture, workers=2), 5), strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(other[name], value)


def test_conversations_with_replayed_text(tmp_path: Path) -> None:
    """Plain text is read with the conversations' tokenizer, chat template and all."""
    mixture = talk_and_text(tmp_path)
    talk, plain = mixture.sources.values()
    assert mixture.fitted == talk.fitted == plain.fitted
    assert mixture.vocab_size == 260 and "target_bytes" not in mixture.example
    found = describe(mixture, 0, batch_size=4, seed=5)
    pieces = {row["source"]: row["pieces"] for row in found["rows"]}
    assert pieces["talk"] is None and "\nline " in pieces["text"][0]["text"]
    assert "its data set does not tell where it comes from" in "".join(spell(found))
    with pytest.raises(UserError, match=r"'text' and 'talk' differ.*leave_out=\('target_bytes',\)"):
        replace(mixture, leave_out=())
    other = Text(
        path=str(tmp_path / "a.txt"), length=145, vocabulary=Pretrained(path=str(tmp_path))
    )
    with pytest.raises(UserError, match=r"'text' and 'talk' are read with different tok.*Shared"):
        replace(mixture, sources={"talk": talk, "text": other}).check()


def test_a_source_of_weight_nothing_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 100)
    (tmp_path / "short.txt").write_text("a")
    text = Text(path=str(tmp_path / "a.txt"), length=8, vocabulary=Bytes())
    short = replace(text, path=str(tmp_path / "short.txt"))
    alone = Mixture(sources={"text": text}, weights={"text": 1})
    both = Mixture(sources={"short": short, "text": text}, weights={"short": 0, "text": 2.5})
    both.check()
    assert set(both.epochs(100)) == {"text"}
    for batch, other in zip(take(alone, 5), take(both, 5), strict=True):
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])
    with pytest.raises(UserError, match=r"the train split of .*short.txt"):
        replace(both, weights={"short": 1, "text": 1}).check()


def test_what_was_learned_must_be_the_same(tmp_path: Path) -> None:
    mixture = labelled(tmp_path)
    assert mixture.classes == ("negative", "positive")
    (tmp_path / "c.csv").write_text("text,label\n" + "bad film,sad\nfine one,glad\n" * 9)
    other = replace(mixture.sources["b"], path=str(tmp_path / "c.csv"), valid_fraction=0)
    mixed = replace(mixture, sources={**mixture.sources, "b": other})
    message = "'b' and 'made' have different classes: glad, sad and negative, positive"
    for use in (mixed.check, lambda: mixed.classes, lambda: take(mixed, 1)):
        with pytest.raises(UserError, match=message):
            use()
    spelled = replace(mixture.sources["b"], vocabulary=Characters())
    with pytest.raises(UserError, match="'b' and 'made' are read with different tokenizers"):
        replace(mixture, sources={**mixture.sources, "b": spelled}).check()
    credit = tables(tmp_path)
    one = replace(credit.sources["train"], min_count=90)
    with pytest.raises(UserError, match="'other' and 'train' have another columns"):
        replace(credit, sources={**credit.sources, "train": one}).check()
    with pytest.raises(UserError, match=r"and Mixture holds several: name one"):
        Shared(of=mixture)
    with pytest.raises(UserError, match=r"'talk' and 'made' differ: tokens .* and tokens"):
        Mixture(
            sources={"made": mixture.sources["made"], "talk": Preferences(kind="labelled")},
            weights={"made": 1, "talk": 1},
        )
