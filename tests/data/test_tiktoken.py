"""Rank files spell as tiktoken does: against its algorithm written plainly, and itself (slow)."""

from __future__ import annotations

import base64
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.data.pieces import byte_level_piece, byte_level_token
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tiktoken import ENCODINGS, as_oniguruma, encoding, read_ranks, tiktoken_json
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.data.vocabulary import BPE, Pretrained, Tiktoken
from lmjax.errors import UserError
from tests.data.published import folder_of, multilingual, npm_folder

WORDS = r" ?[a-z]+|\s+|[^a-z\s]{1,3}"
CORPUS = ["To be, or not to be: that is the question.\nthe banana cabana é 漢 🎭 " * 20]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """256 bytes and what the corpus makes of them."""
    learned = BPE(vocab_size=457).learn(CORPUS, [])
    assert isinstance(learned, SubwordTokenizer)
    vocab = json.loads(learned.tokenizer_json)["model"]["vocab"]
    return {byte_level_piece(token): rank for token, rank in vocab.items()}


def written(ranks: dict[bytes, int], file: Path) -> str:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    file.write_bytes(b"".join(lines))
    return str(file)


def spelled(ranks: dict[bytes, int], text: str) -> list[int]:
    """As tiktoken: of neighbours that make a token, the lowest and then the leftmost first."""
    ids = []
    for word in re.findall(WORDS, text):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in ranks:
            parts = [word.encode()]
        while True:
            pairs = [(ranks.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
            found = [(rank, i) for rank, i in pairs if rank is not None]
            if not found:
                break
            _, at = min(found)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_ids_are_those_of_the_algorithm(ranks: dict[bytes, int], tmp_path: Path) -> None:
    path = written(ranks, tmp_path / "ranks")
    special = ("<|endoftext|>", "<|pad|>")
    tokenizer = Tiktoken(path=path, pattern=WORDS, special=special).learn([], [])
    assert tokenizer.vocab_size == len(ranks) + 2 and tokenizer.end_id == len(ranks)
    again = tokenizer_from_json(tokenizer.to_json())
    parts = st.sampled_from([*"abentho \n.,é漢🎭", "the", " be", "nana"])
    letters = st.lists(parts, max_size=40).map("".join)

    @settings(deadline=None, max_examples=300)
    @given(letters)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids.tolist() == spelled(ranks, text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        np.testing.assert_array_equal(again.encode(text), ids)

    check()
    assert tokenizer.encode(CORPUS[0]).tolist() == spelled(ranks, CORPUS[0])
    ids = tokenizer.encode("be<|endoftext|><|pad|>")
    assert ids.max() < len(ranks)
    assert tokenizer.encode_prompt("be<|pad|>").tolist()[-1] == len(ranks) + 1


END = ["\n\n", "  ", " x", "!?\n"]
PARTS = {
    "r50k_base": ["I", "'ll", " pay", " 12345", "€", " DON", "'", "T", "\n\n  ", " x", "!?", "\n"],
    "cl100k_base": ["I", "'ll", " pay", " ", "123", "45", "€", " DON", "'T", *END],
    "o200k_base": ["I'll", " pay", " ", "123", "45", "€", " DON'T", *END],
    "qwen": ["I", "'ll", " pay", " ", *"12345", "€", " DON", "'T", *END],
}


@pytest.mark.parametrize("name", PARTS)
def test_how_published_encodings_cut_words(name: str) -> None:
    import tokenizers

    pattern = tokenizers.Regex(as_oniguruma(ENCODINGS[name].pattern))
    cut = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    text = "I'll pay 12345€ DON'T\n\n   x!?\n"
    assert [part for part, _ in cut.pre_tokenize_str(text)] == PARTS[name]


def test_ids_of_special_tokens_may_leave_gaps(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """As in cl100k_base, whose ranks end at 100255 and whose end is 100257."""
    gap = ENCODINGS["cl100k_base"].special
    assert gap["<|endoftext|>"] == 100257 and len(gap) == 5
    text = tiktoken_json(ranks, ENCODINGS["cl100k_base"])
    tokenizer = SubwordTokenizer(tokenizer_json=text, vocab_size=100277, end_id=100257)
    tokenizer.check()
    assert tokenizer.encode_prompt("be<|endofprompt|>").tolist()[-1] == 100276
    llama = Pretrained(path=written(ranks, tmp_path / "llama3.tiktoken")).learn([], [])
    assert llama.vocab_size == len(ranks) + 256 and llama.end_id == len(ranks) + 1
    assert llama.encode_prompt("be")[0] == len(ranks) == llama.special_id("bos_token")
    qwen = Pretrained(path=written(ranks, tmp_path / "qwen.tiktoken")).learn([], [])
    np.testing.assert_array_equal(qwen.encode("e\u0301"), qwen.encode("\u00e9"))
    assert len(llama.encode("e\u0301")) > len(llama.encode("\u00e9"))


def tekken(ranks: dict[bytes, int], **changed: object) -> str:
    tokens = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    about = {"pattern": WORDS, "default_num_special_tokens": 30, "default_vocab_size": 300}
    return json.dumps({"config": about, "vocab": tokens} | changed)


def test_tekken(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """Special tokens come first, and only so many ranks are used as the file says."""
    file = tmp_path / "tekken.json"
    file.write_text(tekken(ranks))
    tokenizer = Pretrained(path=str(tmp_path)).learn([], [])
    few = {token: rank for token, rank in ranks.items() if rank < 270}
    ids = tokenizer.encode(CORPUS[0])
    assert (ids - 30).tolist() == spelled(few, CORPUS[0])
    assert tokenizer.vocab_size == 300 and tokenizer.end_id == 2
    assert tokenizer.encode_prompt("[INST]<SPECIAL_25>").tolist() == [1, 3, 25]
    named = [{"rank": 0, "token_str": "</s>"}, {"rank": 1, "token_str": "<s>"}]
    other = tmp_path / "tekken_2.json"
    other.write_text(tekken(ranks, special_tokens=named))
    assert Pretrained(path=str(other)).learn([], []).end_id == 0
    other = tmp_path / "tekken_3.json"
    other.write_text('{"config": {}}')
    with pytest.raises(UserError, match=r"tekken_3.json is no tekken.json of Mistral: .*KeyError"):
        Pretrained(path=str(other)).learn([], [])


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (r"\p{L}++|\s++$|[$^+]", r"\p{L}++|\s++\z|[$^+]"),
        (r"\p{N}{1,3}+|a", r"\p{N}{1,3}|a"),
        (r"\p{N}{1,3}+", r"\p{N}{1,3}"),
        (r"^\$\p{L}+|x\x{20}+", r"\A\$\p{L}+|x\x{20}+"),
    ],
)
def test_patterns_for_the_other_engine(given: str, made: str) -> None:
    assert as_oniguruma(given) == made


def test_refused(ranks: dict[bytes, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\{m,n\}\+ before 'b'"):
        as_oniguruma("a{1,2}+b")
    with pytest.raises(UserError, match=r"no encoding 'cl100k'.*Did you mean 'cl100k_base'"):
        encoding("cl100k")
    with pytest.raises(UserError, match="give one of them"):
        Tiktoken(path="x")
    with pytest.raises(UserError, match="give one of them"):
        Tiktoken(path="x", encoding="gpt2", pattern="a")
    path = written(ranks, tmp_path / "mine.tiktoken")
    with pytest.raises(UserError, match=r"no encoding 'mine'.*Tiktoken\(path"):
        Pretrained(path=path).learn([], [])
    with pytest.raises(UserError, match=r"no tokenizer at .*Did you mean"):
        Tiktoken(path=path.replace("mine", "mind"), encoding="gpt2").learn([], [])
    with pytest.raises(UserError, match=r"is no rank file of tiktoken: .*cannot be read"):
        Tiktoken(path=path, pattern="(").learn([], [])
    with pytest.raises(UserError, match="the end '<end>' is not among the special tokens"):
        Tiktoken(path=path, pattern=WORDS, end="<end>").learn([], [])
    for data, text in [
        (b"YQ== 0\nYg== x\n", "line 2 is no token"),
        (b"YQ\n", "line 1 is no token"),
        (b"?? 1\n", "line 1 is no token"),
        (b"YQ== 0\nYg== 0\n", "its 2 tokens do not have an id each"),
        (b"YQ== -1\n", "its ids are not among 0 to"),
        (b"YQ== 0\n", "it lacks 255 of the 256 bytes"),
        (b"", "its 0 tokens"),
    ]:
        with pytest.raises(UserError, match=text):
            read_ranks(data)
    taken = {**ENCODINGS["gpt2"].special, "x": 3}
    with pytest.raises(UserError, match="the special token 'x' has the id 3, which is another's"):
        tiktoken_json(ranks, type(ENCODINGS["gpt2"])(pattern=WORDS, special=taken))


def test_names_of_bytes() -> None:
    every = bytes(range(256))
    assert byte_level_piece(byte_level_token(every)) == every
    assert byte_level_token(b" \n") == "ĠĊ"


def same(tokenizer: SubwordTokenizer, theirs: object) -> None:
    """The ids of a megabyte, and of every character in a text of its own."""
    every = [f"a{chr(c)}1{chr(c)} {chr(c)}b" for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    for text in [*multilingual(), *every]:
        ids = tokenizer.encode(text)
        assert ids.tolist() == theirs.encode_ordinary(text)  # type: ignore[attr-defined]
        assert tokenizer.decode(ids) == text


CACHE = {
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHE)
def test_published_encodings_on_a_megabyte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    cache = folder_of("llama_index") / "core/_static/tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    tokenizer = Tiktoken(path=str(cache / CACHE[name]), encoding=name).learn([], [])
    theirs = tiktoken.get_encoding(name)
    assert tokenizer.vocab_size == theirs.n_vocab and tokenizer.end_id == theirs.eot_token
    assert isinstance(tokenizer, SubwordTokenizer)
    same(tokenizer, theirs)


@pytest.mark.slow
def test_tekken_on_a_megabyte() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    file = folder_of("mistral_common") / "data/tekken_240911.json"
    tokenizer = Pretrained(path=str(file)).learn([], [])
    whole = json.loads(file.read_text())
    first, size = (whole["config"][f"default_{n}"] for n in ("num_special_tokens", "vocab_size"))
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] + first for t in whole["vocab"]}
    theirs = tiktoken.Encoding(
        name="tekken",
        pat_str=whole["config"]["pattern"],
        mergeable_ranks={token: rank for token, rank in ranks.items() if rank < size},
        special_tokens={},
    )
    assert isinstance(tokenizer, SubwordTokenizer)
    same(tokenizer, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "name"), [("llama3", "llama3"), ("qwen3", "qwen")])
def test_rank_files_are_their_tokenizer_json(folder: str, name: str, tmp_path: Path) -> None:
    """Llama 3 and Qwen were published both ways."""
    published = Pretrained(path=str(npm_folder(folder))).learn([], [])
    assert isinstance(published, SubwordTokenizer)
    tree = json.loads(published.tokenizer_json)
    ranks = {byte_level_piece(token): rank for token, rank in tree["model"]["vocab"].items()}
    made = Pretrained(path=written(ranks, tmp_path / f"{name}.tiktoken")).learn([], [])
    for text in multilingual():
        np.testing.assert_array_equal(made.encode(text), published.encode(text))
