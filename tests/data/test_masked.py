"""Masking: which tokens are chosen, what becomes of them, and that the index alone decides."""

import itertools
import json
import types
from dataclasses import replace

import numpy as np
import pytest

from lmjax.data.labelled_text import LabelledText
from lmjax.data.masked import Masked, validation, vocab_size
from lmjax.data.mixture import Mixture
from lmjax.data.pretrained import read_tokenizer
from lmjax.data.text import Text
from lmjax.data.tokenizer import ByteTokenizer, CharacterTokenizer
from lmjax.data.vocabulary import BPE, Characters
from lmjax.data.words import words_of
from lmjax.errors import UserError

TEXT = "The quick brown fox, aged 42, jumps over the lazy dog; it's 7 o'clock now.\n" * 6


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LINE = ("[CLS]", "un", "##aff", "##able", ",", "play", "##s", "[MASK]", "好", "的", "[SEP]")


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    """A tokenizer as BERT's files have it, of the few words of LINE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL, *LINE)))}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    folder = tmp_path_factory.mktemp("wordpiece")
    made.save(str(folder / "tokenizer.json"))
    roles = {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    return read_tokenizer(str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    for n in range(6):
        (folder / f"{n}.txt").write_text(f"Document {n}. {TEXT}")
    return str(folder)


@pytest.fixture(scope="module")
def data(folder):
    text = Text(path=folder, length=48, vocabulary=BPE(vocab_size=300), valid_fraction=0.4)
    return Masked(of=text)


def first(data, *, seed=0, **arguments):
    return next(iter(data.batches(batch_size=8, seed=seed, **arguments)))


def spans(tokenizer, tokens, numbers):
    """The text of each word."""
    return [
        tokenizer.decode([t for t, n in zip(tokens, numbers, strict=True) if n == word])
        for word in sorted(set(numbers.tolist()))
    ]


def words(tokenizer, text):
    tokens = np.asarray(tokenizer.encode(text))
    segments = np.ones(len(tokens), np.int32)
    return spans(tokenizer, tokens, words_of(tokenizer).numbered(tokens, segments))


def test_words_of_characters_bytes_and_merges(data):
    line = "The quick fox, aged 42"
    expected = ["The", " ", "quick", " ", "fox", ",", " ", "aged", " ", "42"]
    assert words(CharacterTokenizer("".join(sorted(set(line)))), line) == expected
    assert words(ByteTokenizer(), line) == expected
    merged = words(data.tokenizer, line)
    assert [word.strip() for word in merged if word.strip()] == [w for w in expected if w != " "]
    assert words(ByteTokenizer(), "naïve") == ["naïve"]
    assert words(CharacterTokenizer("好书的ab"), "好书ab的") == ["好", "书", "ab", "的"]


def test_words_of_wordpiece(wordpiece):
    """What begins with ## goes on with a word, all else begins one, special tokens are no text."""
    found = words_of(wordpiece)
    ids = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL, *LINE)))}
    tokens = np.array([ids[token] for token in LINE], np.int32)
    numbers = found.numbered(tokens, np.ones(len(tokens), np.int32))
    starts = [not token.startswith("##") for token in LINE]
    np.testing.assert_array_equal(np.diff(numbers, prepend=0) > 0, starts)
    choosable = [token not in SPECIAL for token in LINE]
    np.testing.assert_array_equal(found.choosable[tokens], choosable)


def test_whole_words_are_chosen_and_special_tokens_never(data):
    table, tokenizer = words_of(data.tokenizer), data.tokenizer
    for batch in itertools.islice(data.batches(batch_size=8, seed=0), 3):
        for row in range(8):
            targets, segments = batch["targets"][row], batch["segments"][row]
            chosen = batch["weights"][row] > 0
            assert not chosen[targets == tokenizer.end_id].any()
            assert not chosen[segments == 0].any()
            free = table.choosable[targets] & (segments > 0)
            numbers = table.numbered(targets, segments)
            for word in set(numbers[chosen].tolist()):
                assert chosen[(numbers == word) & free].all()
            changed = batch["tokens"][row] != targets
            assert not (changed & ~chosen).any()
            wanted = max(1, round(0.15 * (segments > 0).sum()))
            longest = np.bincount(numbers[free]).max()
            assert wanted - longest < chosen.sum() <= wanted


def test_a_limit_holds(data):
    limited = Masked(of=data.of, masked_fraction=0.5, max_predictions=5, unit="token")
    np.testing.assert_array_equal(first(limited)["weights"].sum(1), 5)


def test_eight_one_and_one_of_ten(data):
    """Of all that is chosen; a random token may be the right one by chance."""
    many = Masked(of=data.of, masked_fraction=0.9, unit="token")
    batches = list(itertools.islice(many.batches(batch_size=64, seed=1), 3))
    tokens, targets, weights = (
        np.concatenate([b[k] for b in batches]) for k in ("tokens", "targets", "weights")
    )
    chosen = weights > 0
    masked, same = (tokens == many.mask_id)[chosen], (tokens == targets)[chosen]
    assert chosen.sum() > 5000
    assert abs(masked.mean() - 0.8) < 0.02
    assert abs(same.mean() - 0.1) < 0.02
    drawn = tokens[chosen & (tokens != targets) & (tokens != many.mask_id)]
    assert words_of(many.tokenizer).choosable[drawn].all()
    assert len(np.unique(drawn)) > 100


def test_batches_are_a_function_of_seed_and_step(data):
    whole = list(itertools.islice(data.batches(batch_size=8, seed=0), 3))
    for shard in (0, 1):
        half = next(iter(data.batches(batch_size=8, seed=0, shard=shard, num_shards=2, start=2)))
        for name, rows in half.items():
            np.testing.assert_array_equal(rows, whole[2][name][4 * shard : 4 * shard + 4])
    assert (first(data, seed=1)["tokens"] != whole[0]["tokens"]).any()
    example = data.example
    assert {k: (v.shape[1:], v.dtype) for k, v in whole[0].items()} == {
        k: (v.shape, v.dtype) for k, v in example.items()
    }


def test_masks_of_validation_stay(data):
    held = validation(data)
    runs = [list(held.epoch_batches(batch_size=4)) for _ in range(2)]
    shards = [list(held.epoch_batches(batch_size=4, shard=s, num_shards=2)) for s in (0, 1)]
    for step, (a, b) in enumerate(zip(*runs, strict=True)):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            parts = np.concatenate([part[step][name] for part in shards])
            np.testing.assert_array_equal(parts, a[name])
    assert sum(batch["weights"].sum() for batch in runs[0]) > 0


def test_labelled_texts_are_masked_one_a_row():
    rows = LabelledText(path="made", length=48)
    data = Masked(of=rows, unit="token")
    plain, masked = (next(iter(d.batches(batch_size=4, seed=0))) for d in (rows, data))
    np.testing.assert_array_equal(masked["targets"], plain["tokens"])
    np.testing.assert_array_equal(masked["positions"][0], np.arange(48))
    assert not masked["weights"][plain["segments"] == 0].any() and masked["weights"].any()
    assert set(masked) == set(data.example)
    held = [
        d.epoch_batches(batch_size=64) for d in (validation(data), replace(rows, split="valid"))
    ]
    for masked, plain in zip(*held, strict=True):
        np.testing.assert_array_equal(masked["targets"], plain["tokens"])


def test_the_mask_is_one_more_id_unless_there_is_one(data, wordpiece):
    assert (data.mask_id, vocab_size(data)) == (300, 301)
    size = wordpiece.vocab_size
    given = types.SimpleNamespace(example=data.of.example, tokenizer=wordpiece, vocab_size=size)
    masked = Masked(of=given)
    assert (masked.mask_id, masked.vocab_size) == (SPECIAL.index("[MASK]"), size)


def test_bad_settings_are_refused(folder, data):
    with pytest.raises(UserError, match="packing='documents'"):
        Masked(of=Text(path=folder, length=8, vocabulary=Characters(), packing="stream"))
    with pytest.raises(UserError, match=r"in \(0, 1\)"):
        Masked(of=data.of, masked_fraction=0.0)
    with pytest.raises(UserError, match="Did you mean 'word'"):
        Masked(of=data.of, unit="words")
    with pytest.raises(UserError, match="give 0 or more"):
        Masked(of=data.of, max_predictions=-1)
    mixture = Mixture(sources={"a": data.of}, weights={"a": 1.0})
    with pytest.raises(UserError, match="Mixture holds nothing out: name the evaluation's text"):
        validation(Masked(of=mixture))
    assert Masked(of=data.of, unit="token").fingerprint != data.fingerprint
