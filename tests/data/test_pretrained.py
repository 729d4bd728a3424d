"""What lies beside a published tokenizer is read with it, and what it lacks is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.data.vocabulary import BPE, Bytes, Characters, Pretrained
from lmjax.errors import UserError
from tests.data.published import folder_of, multilingual

CORPUS = ["To be, or not to be: that is the question. é 漢 🎭\n" * 9]


def saved(folder: Path, *, bos: bool = False, **beside: Any) -> str:
    """A byte-level tokenizer.json with special tokens, and JSON files beside it."""
    import tokenizers

    learned = BPE(vocab_size=300).learn(CORPUS, [])
    assert isinstance(learned, SubwordTokenizer)
    made = tokenizers.Tokenizer.from_str(learned.tokenizer_json)
    made.add_special_tokens(["<s>", "</s>", "<pad>", "<|endoftext|>", "[SEP]"])
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    made.save(str(folder / "tokenizer.json"))
    for name, held in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(held))
    return str(folder)


def read(path: str, **options: str) -> SubwordTokenizer:
    made = Pretrained(path=path, **options).learn([], [])
    assert isinstance(made, SubwordTokenizer)
    assert tokenizer_from_json(made.to_json()).hash == made.hash
    return made


def token(made: SubwordTokenizer, index: int) -> str:
    vocab = json.loads(made.tokenizer_json)["added_tokens"]
    return str(next(t["content"] for t in vocab if t["id"] == index))


@pytest.mark.parametrize(
    ("beside", "end"),
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": "</s>", "sep_token": "[SEP]"}}, "</s>"),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, "</s>"),
        ({"tokenizer_config": {"eos_token": None, "sep_token": "[SEP]"}}, "[SEP]"),
        ({"special_tokens_map": {"eos_token": "<pad>"}}, "<pad>"),
        (
            {
                "special_tokens_map": {"eos_token": "<pad>"},
                "tokenizer_config": {"eos_token": "</s>"},
            },
            "</s>",
        ),
    ],
)
def test_what_ends_a_document(beside: dict[str, Any], end: str, tmp_path: Path) -> None:
    made = read(saved(tmp_path, **beside))
    assert token(made, made.end_id) == end
    other = read(str(tmp_path / "tokenizer.json"), end="<s>")
    assert token(other, other.end_id) == "<s>"


def test_prompts_have_bos_and_control_tokens(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = read(saved(tmp_path, bos=True, tokenizer_config=names))
    bos, end, pad = (made.special_id(role) for role in names)
    assert made.special_id("cls_token") is None
    text = "to be</s>"
    assert made.encode_prompt(text).tolist() == [bos, *made.encode("to be"), end]
    assert not {bos, end, pad} & set(made.encode(text).tolist())
    assert made.decode(made.encode_prompt(text)) == "to be"
    for plain in (Bytes().learn([], []), Characters().learn(["to be"], [])):
        np.testing.assert_array_equal(plain.encode_prompt("to be"), plain.encode("to be"))


def test_chat_templates_beside_it(tmp_path: Path) -> None:
    path = saved(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": "in the config"})
    assert read(path).chat_templates == (("default", "in the config"),)
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    for folder in ("two", "files"):
        (tmp_path / folder).mkdir()
        path = saved(tmp_path / folder, tokenizer_config={"chat_template": named})
        if folder == "files":
            (tmp_path / "files/chat_template.jinja").write_text("é")
            (tmp_path / "files/additional_chat_templates").mkdir()
            (tmp_path / "files/additional_chat_templates/rag.jinja").write_text("c")
    assert read(str(tmp_path / "two")).chat_templates == (("default", "a"), ("tool_use", "b"))
    assert dict(read(path).chat_templates) == {"default": "é", "tool_use": "b", "rag": "c"}


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*tokenizer.json"):
        Pretrained(path=str(tmp_path)).learn([], [])
    path = saved(tmp_path, tokenizer_config={"eos_token": "<eos>"})
    with pytest.raises(UserError, match=r"has no token '<eos>': set `end`.*<\|endoftext\|>"):
        Pretrained(path=path).learn([], [])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json beside it is damaged"):
        Pretrained(path=str(tmp_path / "tokenizer.json")).learn([], [])
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="it holds no names"):
        Pretrained(path=str(tmp_path / "tokenizer.json"), end="</s>").learn([], [])


def unigram(folder: Path) -> str:
    """A tokenizer.json in the manner of T5's: control tokens are pieces like others."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "s", "/", "b", "##", "▁a"]
    vocab = [[piece, -1.0 if piece == "▁a" else -2.0] for piece in pieces]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tree = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True} | flags for i in range(3)
        ],
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        },
        "decoder": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return str(folder)


def test_a_text_cannot_spell_the_control_tokens_of_a_unigram(tmp_path: Path) -> None:
    import tokenizers

    made = read(unigram(tmp_path))
    assert made.end_id == 1
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.encode_special_tokens = True
    assert plain.encode("a</s>").ids == [9, 1]  # what is to be prevented
    assert made.encode("a</s>").tolist() == [9, 2, 6, 5, 2]
    assert made.encode("ab </s>b").tolist() == [9, 7, 3, 2, 6, 5, 2, 7]
    assert made.encode("ab sab").tolist() == plain.encode("ab sab").ids
    assert made.encode_prompt("a</s>").tolist() == [9, 1]


def test_signs_of_words_are_text_elsewhere(tmp_path: Path) -> None:
    """ "##" is a continuation for WordPiece alone."""
    made = read(unigram(tmp_path))
    assert made.token_bytes().tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]


@pytest.mark.slow
def test_t5_on_a_megabyte() -> None:
    import tokenizers

    file = folder_of("traceforge_title_model") / "data/span/tokenizer.json"
    made = read(str(file), end="</s>")
    plain = tokenizers.Tokenizer.from_file(str(file))
    plain.no_truncation()
    for text in multilingual():
        np.testing.assert_array_equal(made.encode(text), plain.encode(text).ids[:-1])
        np.testing.assert_array_equal(made.encode_prompt(text), plain.encode(text).ids)
