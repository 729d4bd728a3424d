import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.prepare.stages import words
from tests.prepare.stages import texts

MIXED = [
    "",
    "  ",
    "Don't panic: 42 TOWELS, über-cool “quotes”…",
    "日本語のテキスト と English がまざる。",
    "สวัสดีครับ ไทย",
    "हिन्दी में लिखा है",
    "tab\tand\x0bvertical\u3000wide\u2003space\x85next",
    "emoji 👩‍💻 and \U0010ffff private \U00030000",
    "no_space_under_scores",
]


def slow_normal(text: str) -> list[str]:
    """Words by the definition, a character at a time."""
    out: list[str] = []
    glued = False
    for character in text:
        alone = any(low <= ord(character) <= high for low, high in words._UNSPACED)
        if unicodedata.category(character)[0] not in "LNM":
            glued = False
        elif glued and not alone:
            out[-1] += character
        else:
            out.append(character)
            glued = not alone
    return out


def spelled(found: words.Words, given: list[str]) -> list[list[str]]:
    cut = []
    for i, text in enumerate(given):
        own = slice(found.offsets_N1[i], found.offsets_N1[i + 1])
        spans = zip(found.starts_W[own], found.lengths_W[own], strict=True)
        cut.append([text[start : start + length] for start, length in spans])
    return cut


def check(given: list[str]) -> None:
    normal = words.normal_words(given)
    assert spelled(normal, given) == [slow_normal(text) for text in given]
    spaced = words.spaced_words(given)
    assert spelled(spaced, given) == [text.split() for text in given]
    flat = [word for text in given for word in text.split()]
    assert spaced.letters_W.tolist() == [any(map(str.isalpha, word)) for word in flat]


def test_words_are_those_of_the_definition():
    check(MIXED)
    check([])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_words_of_any_text(given):
    check(given)


def test_equal_words_and_only_those_have_equal_hashes():
    given = texts.plays()[:60]
    for function, spell in ((words.spaced_words, str), (words.normal_words, str.lower)):
        found = function(given)
        flat = [spell(word) for text in spelled(found, given) for word in text]
        named = dict(zip(found.hashes_W.tolist(), flat, strict=True))
        assert [named[value] for value in found.hashes_W.tolist()] == flat
        assert len(named) == len(set(flat)) > 1000


def test_a_hash_does_not_depend_on_the_text_around():
    random.seed(0)
    alone = words.normal_words(["panic"]).hashes_W[0]
    for before in ("", "x " * 7, "é. " * 1000):
        assert alone in words.normal_words(["first", f"{before}PANIC!"]).hashes_W


def test_ngrams_equal_tuples_of_words():
    given = ["a b c a b c d", "", "a b", "a b c", "d a b c"]
    found = words.spaced_words(given)
    hashes_G, offsets = words.ngrams(found.hashes_W, found.offsets_N1, 3)
    flat = [tuple(t.split()[i : i + 3]) for t in given for i in range(len(t.split()) - 2)]
    assert np.diff(offsets).tolist() == [5, 0, 0, 1, 2]
    by_hash = dict(zip(hashes_G.tolist(), flat, strict=True))
    assert [by_hash[value] for value in hashes_G.tolist()] == flat
    assert len(by_hash) == len(set(flat))


def test_characters_are_those_of_words_joined_by_spaces():
    given = [*MIXED, "The  end."]
    found = words.normal_characters(given)
    joined = words.normal_characters(["the end "])
    own = found.hashes_W[found.offsets_N1[-2] :]
    assert own.tolist() == joined.hashes_W.tolist()
    for i, text in enumerate(given):
        size = found.offsets_N1[i + 1] - found.offsets_N1[i]
        runs = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text).split()
        assert size == sum(len(run) + 1 for run in runs)


@pytest.mark.parametrize("sizes", [[], [5], [words.CHUNK + 1, 3, 3], [words.CHUNK // 2] * 5])
def test_chunks_cover_all_texts_in_order(sizes):
    given = ["x" * size for size in sizes]
    covered = [i for piece in words.chunks(given) for i in range(piece.start, piece.stop)]
    assert covered == list(range(len(given)))
