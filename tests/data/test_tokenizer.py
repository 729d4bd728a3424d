"""Every tokenizer spells text and back, counts its bytes, and survives JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.data import vocabulary
from lmjax.data.tokenizer import TextTokenizer, tokenizer_from_json
from lmjax.data.vocabulary import BPE, Bytes, Characters, Pretrained, Vocabulary
from lmjax.errors import UserError

CORPUS = ["To be, or not to be: that is the question.\n" * 20, "Être ou ne pas être 漢 🎭 ~~\n" * 9]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer.json with a special token in its middle."""
    import tokenizers

    made = json.loads(BPE(vocab_size=300).learn(CORPUS, []).to_json())["tokenizer"]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(made))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    file = tmp_path_factory.mktemp("pretrained") / "tokenizer.json"
    tokenizer.save(str(file))
    return str(file)


@pytest.fixture(scope="module", params=["bytes", "characters", "bpe", "pretrained"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_json: str) -> TextTokenizer:
    vocabularies: dict[str, Vocabulary] = {
        "bytes": Bytes(),
        "characters": Characters(),
        "bpe": BPE(vocab_size=300),
        "pretrained": Pretrained(path=tokenizer_json),
    }
    chosen = vocabularies[request.param]
    learned = chosen.learn(CORPUS[:1], CORPUS[1:])
    assert chosen.vocab_size in (None, learned.vocab_size)
    return learned


def test_round_trip_and_bytes(tokenizer: TextTokenizer) -> None:
    for text in [*CORPUS, "", "e"]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.end_id not in ids
        assert ids.max(initial=0) < tokenizer.vocab_size
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes()[tokenizer.end_id] == 0


@settings(deadline=None, max_examples=50)
@given(ids=st.lists(st.integers(-5, 400)))
def test_any_ids_decode(tokenizer: TextTokenizer, ids: list[int]) -> None:
    assert isinstance(tokenizer.decode(ids), str)
    assert tokenizer.decode([tokenizer.end_id]) == ""


def test_json_round_trip(tokenizer: TextTokenizer) -> None:
    again = tokenizer_from_json(tokenizer.to_json())
    assert again.hash == tokenizer.hash
    assert again.vocab_size == tokenizer.vocab_size and again.end_id == tokenizer.end_id
    np.testing.assert_array_equal(again.encode(CORPUS[1]), tokenizer.encode(CORPUS[1]))
    np.testing.assert_array_equal(again.token_bytes(), tokenizer.token_bytes())


def test_hashes_differ(tokenizer_json: str) -> None:
    vocabularies = [Bytes(), Characters(), BPE(vocab_size=300), Pretrained(path=tokenizer_json)]
    assert len({v.learn(CORPUS, []).hash for v in vocabularies}) == 4
    with pytest.raises(UserError, match=r"kind 'byts'.*Did you mean 'bytes'"):
        tokenizer_from_json('{"kind": "byts"}')


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_and_bpe_spell_any_text(text: str) -> None:
    for made in (Bytes(), BPE(vocab_size=300)):
        tokenizer = made.learn(CORPUS, [])
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_bytes_by_hand() -> None:
    tokenizer = Bytes().learn([], [])
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3, 98, 256, 257]) == "a\ufffdb\ufffd"
    with pytest.raises(UserError, match="UTF-8"):
        tokenizer.encode("\ud800")


def test_characters_by_hand() -> None:
    tokenizer = Characters().learn(["ba"], ["🎭"])
    assert tokenizer.encode("ab🎭").tolist() == [0, 1, 2]
    assert tokenizer.end_id == 3 and tokenizer.vocab_size == 4
    assert tokenizer.token_bytes().tolist() == [1, 1, 4, 0]
    with pytest.raises(UserError, match=r"'Z' \(U\+005A\) at offset 1 .*BPE"):
        tokenizer.encode("aZ")
    with pytest.raises(UserError, match=r"U\+1F600"):
        tokenizer.encode("\U0001f600")


def test_bpe_merges_learns_from_training_alone_and_is_cached(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BPE(vocab_size=290)
    learned = made.learn(CORPUS[:1], CORPUS[1:])
    assert learned.hash == made.learn(CORPUS[:1], []).hash
    assert learned.end_id == 289
    assert len(learned.encode(CORPUS[0])) < 0.6 * len(CORPUS[0])
    files = set((cache / "tokenizers").iterdir())
    monkeypatch.setattr(vocabulary.BPE, "_train", None)
    assert made.learn(CORPUS[:1], []).hash == learned.hash
    assert set((cache / "tokenizers").iterdir()) == files
    with pytest.raises(UserError, match=r"vocab_size is 256.*at least 257"):
        BPE(vocab_size=256)


def test_special_tokens_in_a_text_are_spelled(tokenizer_json: str) -> None:
    tokenizer = Pretrained(path=tokenizer_json).learn([], [])
    text = "be<|endoftext|>be"
    ids = tokenizer.encode(text)
    assert tokenizer.end_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text)


def test_sentencepiece_style(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pieces = {"<unk>": 0, "</s>": 1, "▁be": 2, "▁": 3, "b": 4, "e": 5, "<0xC3>": 6, "<0xA9>": 7}
    model = models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Pretrained(path=str(tmp_path), end="</s>").learn([], [])
    ids = tokenizer.encode("be é")
    assert tokenizer.decode([*ids, 1, 99, -1]).startswith("be é")
    assert tokenizer.token_bytes()[ids].sum() == 5
    assert tokenizer.token_bytes().tolist() == [0, 0, 3, 1, 1, 1, 1, 1]


def test_bad_pretrained(tmp_path: Path, tokenizer_json: str) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*Did you mean"):
        Pretrained(path=tokenizer_json.replace("tokenizer.json", "tokeniser.json")).learn([], [])
    with pytest.raises(UserError, match=r"no token '<eos>': set `end`.*<\|endoftext\|>"):
        Pretrained(path=tokenizer_json, end="<eos>").learn([], [])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x.json is no tokenizer.json"):
        Pretrained(path=str(tmp_path / "x.json")).learn([], [])


def test_the_tokenizer_of_a_run_can_be_used_again(tmp_path):
    """What a run writes as tokenizer.json is read by `Pretrained`, ids and end alike."""
    learned = BPE(vocab_size=300).learn(["to be or not to be " * 20], [])
    path = tmp_path / "tokenizer.json"
    path.write_text(learned.to_json())
    again = Pretrained(path=str(path)).learn([], [])
    assert again.hash == learned.hash and again.end_id == learned.end_id


def _bpe(**model: object) -> str:
    """A tokenizer.json of a few tokens, with what is given in its model."""
    whole = {"type": "BPE", "vocab": {"a": 0, "b": 1, "<end>": 2}, "merges": []} | model
    special = {"id": 2, "content": "<end>", "special": model.get("special", True)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return json.dumps({"version": "1.0", "added_tokens": [special | flags], "model": whole})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_bpe()[:40], "x.json is no tokenizer.json .*EOF"),
        (_bpe(merges=["a c"]), "x.json is no tokenizer.json"),
        (_bpe(vocab={"a": 0, "b": 0, "<end>": 2}), "the tokens 'a' and 'b' have one id, 0"),
        (_bpe(vocab={"a": 10**8, "<end>": 2}), "vocab_size is 100000001: give 1 to 16777216"),
        (_bpe(dropout=0.5), "its dropout is not 0"),
        (_bpe(special=False), "a text can spell the token '<end>'"),
        ('{"kind": "subword", "vocab_size": 3}', "lacks its tokenizer, vocab_size or end_id"),
    ],
)
def test_ambiguous_and_damaged_vocabularies(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Pretrained(path=str(path), end="<end>").learn([], [])


def test_what_a_vocabulary_cannot_spell(tmp_path: Path, tokenizer_json: str) -> None:
    """Dropped without a word by `tokenizers`, or raised as a bare Exception."""
    path = tmp_path / "x.json"
    path.write_text(_bpe())
    with pytest.raises(UserError, match="the tokenizer drops 2 bytes"):
        Pretrained(path=str(path), end="<end>").learn([], []).encode("cd")
    tree = json.loads(Path(tokenizer_json).read_text())
    tree["model"]["vocab"]["gone"] = tree["model"]["vocab"].pop("z")
    path = tmp_path / "y.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="the tokenizer drops 1 bytes of the text"):
        Pretrained(path=str(path)).learn([], []).encode("zoo")
    with pytest.raises(UserError, match="the tokenizer cannot spell the text"):
        Pretrained(path=tokenizer_json).learn([], []).encode("half a pair: \ud800")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "5", '{"kind": 5}', '{"kind": "characters"}'),
        *('{"kind": "characters", "characters": "aa"}', "[" * 100_000, '{"kind": "words"}'),
        '{"kind": "subword", "vocab_size": 5, "end_id": 9, "tokenizer": {}}',
    ],
)
def test_damaged_saved_tokenizer(text: str) -> None:
    with pytest.raises(UserError, match="the saved tokenizer is"):
        tokenizer_from_json(text)
