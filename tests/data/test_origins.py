"""Origins against the documents on disk: the tokens and characters that they name are the row's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmjax.data.mixture import Mixture
from lmjax.data.origins import Origin
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import BPE, Bytes, Characters, Pretrained, Vocabulary

LENGTH = 16


@pytest.fixture(scope="module")
def data(folder: str) -> Text:
    return Text(path=folder, length=LENGTH, vocabulary=Bytes(), valid_fraction=0.3)


def places(text: Text, whole: str) -> list[tuple[int, int]]:
    """The characters that each token of a document touches, its end included."""
    if isinstance(text.vocabulary, BPE):
        found = list(text.tokenizer._tokenizer.encode(whole, add_special_tokens=False).offsets)
    else:
        lengths = [len(c.encode()) if text.vocabulary == Bytes() else 1 for c in whole]
        found = [(i, i + 1) for i, length in enumerate(lengths) for _ in range(length)]
    return [*found, (len(whole), len(whole))]


def check(text: Text, origin: Origin, example: dict[str, np.ndarray]) -> np.ndarray:
    """Reads every piece from its file and compares; returns which columns the pieces cover."""
    covered = np.zeros(LENGTH, bool)
    for piece in origin.pieces:
        begin, end = piece.columns
        assert 0 <= begin < end <= LENGTH and not covered[begin:end].any()
        covered[begin:end] = True
        whole = Path(piece.name).read_bytes().decode()
        ids = np.append(text.tokenizer.encode(whole), text.tokenizer.end_id)
        first, last = piece.tokens
        np.testing.assert_array_equal(example["tokens"][begin:end], ids[first:last])
        touched = places(text, whole)[first:last]
        assert piece.characters == (touched[0][0], touched[-1][1])
    return covered


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("vocabulary", [Bytes(), Characters(), BPE(vocab_size=300)], ids=repr)
def test_pieces_are_what_the_files_hold(data: Text, vocabulary: Vocabulary, split: str) -> None:
    text = replace(data, vocabulary=vocabulary, split=split)
    examples, origins = text.examples(seed=3), text.origins(seed=3)
    for index in (*range(60), 10**9):
        origin, example = origins[index], examples[index]
        covered = check(text, origin, example)
        np.testing.assert_array_equal(covered, example["segments"] > 0)
        numbers = [piece.document for piece in origin.pieces]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert origin.source == ""


def test_characters_are_counted_and_not_bytes(tmp_path: Path) -> None:
    """A window that begins in the middle of a character belongs to that character."""
    (tmp_path / "a.txt").write_text("aé漢🎭b" * 20, "utf-8")
    text = Text(path=str(tmp_path / "a.txt"), length=3, vocabulary=Bytes(), valid_fraction=0)
    expected = {  # first byte in the period of 11 -> characters of the 3 bytes from there on
        **{0: (0, 2), 1: (1, 3), 2: (1, 3), 3: (2, 3), 4: (2, 4), 5: (2, 4)},
        **{6: (3, 4), 7: (3, 4), 8: (3, 5), 9: (3, 6), 10: (4, 7)},
    }
    examples, origins = text.examples(seed=0), text.origins(seed=0)
    seen = set()
    for index in range(text.num_examples):
        (piece,) = origins[index].pieces
        periods, first = divmod(piece.tokens[0], 11)
        seen.add(first)
        begin, end = expected[first]
        assert piece.characters == (5 * periods + begin, 5 * periods + end)
        tokens = examples[index]["tokens"]
        assert bytes(tokens.tolist()) == ("aé漢🎭b" * 20).encode()[slice(*piece.tokens)]
    assert seen == set(range(11))


def test_the_documents_end_is_a_place_too(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 4)
    text = Text(path=str(tmp_path), length=1, vocabulary=Bytes(), valid_fraction=0)
    origins, examples = text.origins(seed=0), text.examples(seed=0)
    found = {}
    for index in range(9 * 20):
        if examples[index]["tokens"].tolist() == [256]:
            (piece,) = origins[index].pieces
            found[piece.document] = piece
    assert found[0].tokens == (4, 5) and found[0].characters == (4, 4)
    assert found[0].name.endswith("a.txt")


def test_the_second_half_of_a_document_is_placed_in_the_whole(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    data = Text(path=str(tmp_path / "input.txt"), length=10, packing="stream")
    (piece,) = validation(data).origins(seed=0)[3].pieces
    assert piece.tokens == (30, 40) and piece.characters == (930, 940)
    (piece,) = data.origins(seed=0)[3].pieces
    assert piece.tokens == piece.characters


def test_lines_of_jsonl_are_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": letter * 5}) for letter in "abc"]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    data = Text(path=str(tmp_path), length=17, vocabulary=Bytes(), valid_fraction=0)
    (origin,) = {data.origins(seed=seed)[0] for seed in range(3)}
    assert [piece.name.rpartition(":")[2] for piece in origin.pieces] == ["1", "2", "3"]
    assert [piece.columns for piece in origin.pieces] == [(0, 6), (6, 12), (12, 17)]


def test_a_tokenizer_that_changes_text_tells_no_characters(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel({"ab": 0, "cd": 1, "?": 2, "</s>": 3}, unk_token="?"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.Fuse()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("AB cd " * 20)
    vocabulary = Pretrained(path=str(tmp_path / "tokenizer.json"), end="</s>")
    data = Text(path=str(tmp_path / "a.txt"), length=4, vocabulary=vocabulary, valid_fraction=0)
    (piece,) = data.origins(seed=0)[0].pieces
    assert piece.characters is None and piece.tokens[1] - piece.tokens[0] == 4


def test_a_mixture_mixes_origins_as_it_mixes_examples(data: Text, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 500)
    other = replace(data, path=str(tmp_path / "b.txt"), valid_fraction=0)
    inner = Mixture(sources={"few": other, "many": data}, weights={"few": 1, "many": 2})
    outer = Mixture(sources={"inner": inner, "many": data}, weights={"inner": 3, "many": 1})
    sources = {"inner/few": other, "inner/many": data, "many": data}
    examples, origins = outer.examples(seed=5), outer.origins(seed=5)
    counts = dict.fromkeys(sources, 0)
    for index in range(80):
        origin = origins[index]
        check(sources[origin.source], origin, examples[index])
        counts[origin.source] += 1
    assert counts == {"inner/few": 20, "inner/many": 40, "many": 20}


def test_the_fingerprint_names_what_batches_are_made_of(data: Text, tmp_path: Path) -> None:
    for folder, last in (("one", "c"), ("copy", "c"), ("other", "d")):
        (tmp_path / folder).mkdir()
        for name, letter in (("a", "a"), ("b", "b"), ("c", last)):
            (tmp_path / folder / f"{name}.txt").write_text(letter * 50)
    one = replace(data, path=str(tmp_path / "one"))
    mixture = Mixture(sources={"one": one, "data": data}, weights={"one": 1, "data": 1})
    same = [one, replace(one, path=str(tmp_path / "copy"), workers=3)]
    assert len({text.fingerprint for text in same}) == 1
    assert replace(mixture, workers=2).fingerprint == mixture.fingerprint
    others = [
        one,
        data,
        mixture,
        replace(one, path=str(tmp_path / "other")),
        replace(one, length=15),
        replace(one, packing="stream"),
        replace(one, vocabulary=Characters()),
        replace(one, valid_fraction=0.5),
        validation(one),
        replace(mixture, weights={"one": 1, "data": 2}),
        replace(mixture, sources={"one": same[1], "data": one}),
    ]
    assert len({text.fingerprint for text in others}) == len(others)
