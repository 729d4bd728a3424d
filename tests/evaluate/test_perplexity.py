"""Perplexity of a sliding window is the numpy sum over tokens, each in the window it belongs to."""

import json
import math

import jax
import numpy as np
import pytest

from lmjax.config import call, to_dict
from lmjax.data.mixture import Mixture
from lmjax.data.source import Document
from lmjax.data.text import Text
from lmjax.data.tokenizer import CharacterTokenizer
from lmjax.data.vocabulary import Bytes
from lmjax.errors import UserError
from lmjax.evaluate.held_out import held_out
from lmjax.evaluate.perplexity import check_window, perplexity, windows
from lmjax.evaluate.score import Scorer
from tests.evaluate import toy

TEXTS = ["To be, or not to be: that is the question.", "Zü", "x", "né\tfür\n " * 4, "ab"]
DOCUMENTS = [Document(name=f"file{i}", text=text) for i, text in enumerate(TEXTS)]


def scorer_of(lm, batch_size=8):
    return Scorer(lm.model, lm.variables, batch_size=batch_size, devices=jax.devices()[:1])


def first_token_seen(target, num_tokens, length, stride):
    """The first token that the model reads before it predicts number `target`."""
    if target <= length:
        return 0
    end = length + stride * math.ceil((target - length) / stride)  # of its window
    return min(end, num_tokens - 1) - length


def by_hand(lm, documents, *, length, stride, bos):
    """(nats, tokens, bytes), token by token."""
    nats, count, size = 0.0, 0, 0
    for document in documents:
        ids = ([256] if bos else []) + list(document.text.encode())
        for target in range(1, len(ids)):
            first = first_token_seen(target, len(ids), length, stride)
            nats -= toy.logprobs(lm.variables, ids[first:target])[ids[target]]
            count, size = count + 1, size + 1
    return nats, count, size


@pytest.mark.parametrize("bos", [False, True])
def test_it_is_the_sum_by_hand_for_every_stride(bos):
    lm = toy.language_model()
    eight, one = scorer_of(lm), scorer_of(lm, batch_size=1)
    for length, stride in [(7, s) for s in range(1, 8)] + [(20, 20), (20, 3), (40, 0), (1, 1)]:
        how = {"length": length, "stride": stride, "prefix": "bos" if bos else "own"}
        found = perplexity(eight, lm.tokenizer, DOCUMENTS, **how)
        nats, count, size = by_hand(lm, DOCUMENTS, length=length, stride=stride or 20, bos=bos)
        assert (found.tokens, found.bytes) == (count, size)
        assert found.nll == pytest.approx(nats, rel=1e-5)
        assert found.unscored == (0 if bos else 1) and found.documents == 5
        if stride in (3, 20):
            alone = perplexity(one, lm.tokenizer, DOCUMENTS, **how)
            assert alone.nll == pytest.approx(found.nll, rel=1e-6)
    numbers = found.numbers()
    assert numbers["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-4)
    assert numbers["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert numbers["byte_perplexity"] == pytest.approx(np.exp(nats / size), rel=1e-4)
    words = 10 + 1 + (1 if bos else 0) + 9 + 1  # white space at the end ends in an empty word
    assert found.words == words
    assert numbers["word_perplexity"] == pytest.approx(np.exp(nats / words), rel=1e-4)
    json.dumps(numbers, allow_nan=False)


def test_windows_cover_every_token_once_with_enough_before_it():
    for num_tokens in (1, 2, 5, 8, 9, 30):
        for length in (1, 2, 7, 8):
            for stride in range(1, length + 1):
                cuts = list(windows(num_tokens, length=length, stride=stride))
                scored = [i for _, last, n in cuts for i in range(last - n, last)]
                assert scored == list(range(1, num_tokens))
                for number, (first, last, n) in enumerate(cuts):
                    assert first >= 0 and last <= num_tokens and last - first <= length + 1
                    if number:
                        assert n <= stride and last - n - first >= length - stride + 1
                        assert last - first == length + 1  # the last one is as long
                if stride == length and (num_tokens - 1) % length == 0:  # disjoint
                    assert [last - first - 1 for first, last, _ in cuts] == [n for *_, n in cuts]


def test_a_tokenizer_that_begins_texts_has_every_token_scored():
    lm = toy.language_model(toy.merging_tokenizer(bos=True))
    found = perplexity(
        scorer_of(lm), lm.tokenizer, [Document(name="a", text="a"), Document(name="b", text="ab")]
    )
    assert (found.tokens, found.bytes, found.unscored) == (2, 3, 0)
    (bos,) = lm.tokenizer.encode_prompt("")
    rows = toy.logprobs(lm.variables, [bos])
    ids = [int(lm.tokenizer.encode(text)[0]) for text in ("a", "ab")]
    assert found.nll == pytest.approx(-rows[ids].sum(), rel=1e-5)


def test_what_cannot_be_evaluated_is_refused():
    lm = toy.language_model()
    scorer = scorer_of(lm)
    for length, stride, message in (
        (41, 0, "length is 41: give 1 to 40"),
        (8, 9, "stride is 9: give 1 to 8"),
        (-1, 0, "length is -1"),
    ):
        with pytest.raises(UserError, match=message):
            check_window(length, stride, 40)
    assert check_window(0, 0, 40) == (40, 20) and check_window(0, 0, 10**6) == (2048, 1024)
    with pytest.raises(UserError, match="none of the 1 documents has a second token"):
        perplexity(scorer, lm.tokenizer, DOCUMENTS[2:3])
    with pytest.raises(UserError, match=r"file0: the character 'T'"):
        perplexity(scorer, CharacterTokenizer("abc"), DOCUMENTS)
    bad = {"params": {k: x * np.nan for k, x in lm.variables["params"].items()}}
    broken = Scorer(lm.model, bad, devices=jax.devices()[:1])
    with pytest.raises(UserError, match="not finite"):
        perplexity(broken, lm.tokenizer, DOCUMENTS)


def test_the_text_that_a_run_held_out(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}. " for i in range(50)))
    texts = {
        name: call(Text, path=str(tmp_path / f"{name}.txt"), length=8, vocabulary=call(Bytes))
        for name in ("one", "two")
    }

    def config(data):
        (tmp_path / "config.json").write_text(json.dumps({"data": to_dict(data)}))

    config(texts["one"])
    (document,) = held_out(tmp_path)
    whole = (tmp_path / "one.txt").read_text()
    assert whole.endswith(document.text) and len(document.text) == len(whole) - document.begin
    assert document.begin == int(0.9 * len(whole))
    config(call(Mixture, sources=texts, weights={"one": 1.0, "two": 2.0}))
    assert [d.text[-9:] for d in held_out(tmp_path)] == [" one 49. ", " two 49. "]
    config(call(Text, path=str(tmp_path / "one.txt"), valid_fraction=0.0))
    with pytest.raises(UserError, match=r"held out no text .* --data"):
        held_out(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="name text to evaluate on, as --data"):
        held_out(tmp_path)
