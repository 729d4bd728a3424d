"""tokenizer.json and the saved tokenizer of a run: cut, with other types, ids used twice."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import leaves
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.data.vocabulary import BPE, Bytes, Characters, Pretrained
from tests.fuzz.damage import mutate
from tests.fuzz.outcome import examples, few_and_many, outcome

TEXT = "the quick brown fox: é 漢 🎭\n" * 3
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def trees():
    """A byte-level BPE with an end, and a vocabulary of words, as `tokenizers` saves them."""
    learned = json.loads(BPE(vocab_size=270).learn([TEXT], []).tokenizer_json)
    learned["added_tokens"] = [
        {"id": 269, "content": END, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    words = {"type": "WordLevel", "vocab": {"the": 0, "fox": 1, "<unk>": 2}, "unk_token": "<unk>"}
    whole = learned | {"model": words, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None}
    return [learned, whole]


def mutated(data, tree):
    """The tree damaged, as often outside its vocabulary as in it."""
    names = [name for name, _ in leaves(tree) if name]
    outside = [name for name in names if "vocab." not in name and "merges." not in name]
    return mutate(data, tree, names=data.draw(st.sampled_from([names, outside])))


def use(tokenizer):
    """Spells, and is spelled: ids in range, never the end among them."""
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.end_id not in ids
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    np.testing.assert_array_equal(tokenizer.encode(TEXT), ids)
    tokenizer.decode([*ids, tokenizer.end_id, -1, 10**9])
    assert tokenizer_from_json(tokenizer.to_json()).hash == tokenizer.hash
    return ids


def test_both_work_as_they_are(trees, tmp_path):
    for tree in trees:
        path = tmp_path / f"{len(tree['model']['vocab'])}.json"
        path.write_text(json.dumps(tree))
        use(Pretrained(path=str(path), end=END).learn([], []))


@few_and_many(100, 1000)
def test_files(count, trees, tmp_path):
    number = iter(range(10**9))

    @examples(count)
    @given(st.data())
    def check(data):
        path = tmp_path / f"{next(number)}.json"  # files are remembered by name
        text = json.dumps(mutated(data, data.draw(st.sampled_from(trees)))).encode()
        if data.draw(st.integers(0, 3)) == 0:
            text = text[: data.draw(st.integers(0, len(text)))] + data.draw(st.binary(max_size=3))
        path.write_bytes(text)

        def read():
            vocabulary = Pretrained(
                path=str(path), end=data.draw(st.sampled_from([END, "the", ""]))
            )
            assert vocabulary.vocab_size > 0
            return use(vocabulary.learn([], []))

        outcome(read)
        path.unlink()

    check()


@pytest.mark.parametrize(
    "vocabulary", [Bytes(), Characters(), BPE(vocab_size=270)], ids=["bytes", "characters", "bpe"]
)
@few_and_many(60, 500)
def test_saved(count, vocabulary):
    """What `to_json` wrote, damaged: an equal tokenizer, another sound one, or an error."""
    text = vocabulary.learn([TEXT], []).to_json()

    @examples(count)
    @given(st.data())
    def check(data):
        changed = json.dumps(mutated(data, json.loads(text)))
        if data.draw(st.booleans()):
            changed = text[: data.draw(st.integers(0, len(text)))]
        outcome(lambda: use(tokenizer_from_json(changed)))

    check()


@few_and_many(60, 500)
def test_texts(count, trees, tmp_path):
    """Any text, half surrogate pairs too."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(trees[0]))
    tokenizers = [
        v.learn([TEXT], [])
        for v in (Bytes(), Characters(), BPE(vocab_size=270), Pretrained(path=str(path), end=END))
    ]

    @examples(count)
    @given(st.text() | st.text(st.characters(categories=["Cs", "Ll"])) | st.just(END))
    def check(text):
        for tokenizer in tokenizers:
            ids, message = outcome(lambda tokenizer=tokenizer: tokenizer.encode(text))
            assert message is not None or tokenizer.decode(ids) == text

    check()
