"""Pieces of text as tokens come: whole characters, spaces of the first word, stop strings."""

import numpy as np
import pytest

from lmjax.data.tokenizer import ByteTokenizer, SubwordTokenizer
from lmjax.errors import UserError
from lmjax.generate.text import TextStream

BYTES = ByteTokenizer()


def streamed(tokenizer, prompt, ids, **arguments):
    stream = TextStream(tokenizer, prompt, **arguments)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.end()], stream


@pytest.fixture(scope="module")
def sentence_pieces():
    """Words that begin with a space, and bytes for all else, as Llama 2 has them."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["▁is", "▁Paris", "▁", "P", "a", "r", "i", "s", "."]
    vocabulary = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True
        )
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made = SubwordTokenizer(tokenizer_json=tokenizer.to_str(), vocab_size=len(vocabulary), end_id=1)
    return made, {token: i for i, token in enumerate(vocabulary)}


def test_pieces_are_the_text_and_no_piece_holds_half_a_character():
    text = "naïve → 你好, 🦙! " * 5
    pieces, stream = streamed(BYTES, BYTES.encode("ab"), BYTES.encode(text))
    assert "".join(pieces) == stream.text == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[:4] == ["n", "a", "", "ï"]


@pytest.mark.parametrize("seed", range(5))
def test_bytes_that_are_no_text_are_those_of_the_whole(seed):
    ids = np.random.default_rng(seed).integers(60, 260, 300)
    pieces, _ = streamed(BYTES, [97], ids)
    assert "".join(pieces) == BYTES.decode(ids)


def test_the_first_word_keeps_its_space(sentence_pieces):
    tokenizer, ids = sentence_pieces
    pieces, _ = streamed(tokenizer, [ids["▁is"]], [ids["▁Paris"], ids["."]])
    assert pieces == [" Paris", ".", ""]
    llama = [ids[f"<0x{byte:02X}>"] for byte in "🦙".encode()]
    prompt = [ids["▁is"], *llama]
    pieces, _ = streamed(tokenizer, prompt, [*llama, ids["."], *llama[:2]])
    assert "".join(pieces) == "🦙.\ufffd\ufffd"
    assert pieces[:5] == ["", "", "", "🦙", "."]


@pytest.mark.parametrize("seed", range(20))
def test_the_first_stop_string_ends_the_text(seed):
    """Random texts over three letters, and stop strings that share their beginnings."""
    random = np.random.default_rng(seed)
    text = "".join(random.choice(list("abc"), 60))
    stop = ["".join(random.choice(list("abc"), size)) for size in (3, 4, 5)]
    found = [text.index(one) for one in stop if one in text]
    expected = text[: min(found)] if found else text
    pieces, stream = streamed(BYTES, [97], BYTES.encode(text), stop=stop)
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == bool(found)
    if found:  # it knows at the stop string's last letter
        size = min(text.index(one) + len(one) for one in stop if one in text)
        _, shorter = streamed(BYTES, [97], BYTES.encode(text[:size]), stop=stop)
        assert shorter.stopped


def test_what_may_begin_a_stop_string_waits():
    stream = TextStream(BYTES, [97], stop=["STOP", "\n\n"])
    pieces = [stream.push(token) for token in BYTES.encode("a\nSTO S")]
    assert pieces == ["a", "", "\n", "", "", "STO ", ""]
    assert stream.end() == "S"


@pytest.mark.parametrize(("stop", "message"), [("ab", r"\['ab'\]"), (["a", ""], "empty string")])
def test_stop_strings_that_cannot_be(stop, message):
    with pytest.raises(UserError, match=message):
        TextStream(BYTES, [97], stop=stop)
