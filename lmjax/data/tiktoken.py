"""tiktoken's rank files, and Mistral's tekken.json, as a tokenizer.json.

Source: the file formats of `tiktoken.load` and of mistral-common's `Tekkenizer`; patterns and
special tokens as published with each encoding. A rank file holds neither, so that the name of the
encoding, or both, must be given.

Departure: of two overlapping merges into the same token that are cut differently, the cut of lower
ids goes first and not the leftmost.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmjax.data.pieces import LARGEST_VOCABULARY, byte_level_token
from lmjax.errors import UserError, did_you_mean

_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RESERVED = "<|reserved_special_token_{}|>"
_LLAMA3 = [
    *("<|begin_of_text|>", "<|end_of_text|>", *(_RESERVED.format(i) for i in range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", _RESERVED.format(4), "<|eot_id|>"),
    *(_RESERVED.format(i) for i in range(5, 251)),
]
_QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a rank file lacks: the pattern that cuts a text into words, and ids of special tokens.

    Attributes:
      pattern: a regular expression as tiktoken takes it.
      special: special tokens and their ids; those of `following` come right after the ranks.
      end: the special token that ends a document.
      bos: the one that begins each prompt; empty for none.
      normal_form: of Unicode, that texts are brought to first; empty for none.
    """

    pattern: str
    special: Mapping[str, int] = field(default_factory=dict)
    following: tuple[str, ...] = ()
    end: str = "<|endoftext|>"
    bos: str = ""
    normal_form: str = ""


ENCODINGS: dict[str, Encoding] = {
    "gpt2": Encoding(pattern=_WORDS, special={"<|endoftext|>": 50256}),
    "r50k_base": Encoding(pattern=_WORDS, special={"<|endoftext|>": 50256}),
    "p50k_base": Encoding(pattern=_WORDS, special={"<|endoftext|>": 50256}),
    "cl100k_base": Encoding(
        pattern=_CL100K,
        special={
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Encoding(
        pattern=_O200K, special={"<|endoftext|>": 199999, "<|endofprompt|>": 200018}
    ),
    "llama3": Encoding(
        pattern=_CL100K, following=tuple(_LLAMA3), end="<|end_of_text|>", bos="<|begin_of_text|>"
    ),
    "qwen": Encoding(
        pattern=_QWEN,
        following=(*_QWEN_SPECIAL, *(f"<|extra_{i}|>" for i in range(205))),
        normal_form="NFC",
    ),
}


def encoding(name: str) -> Encoding:
    """The published encoding of this name; raises UserError for another."""
    if name not in ENCODINGS:
        raise UserError(f"no encoding {name!r}." + did_you_mean(name, ENCODINGS))
    return ENCODINGS[name]


def read_ranks(data: bytes) -> dict[bytes, int]:
    """The tokens of a .tiktoken file: a line for each, its bytes in base64 and its id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"line {number} is no token in base64 and its rank: {error}."
            ) from error
    _check_ranks(ranks)
    return ranks


def tiktoken_json(ranks: Mapping[bytes, int], encoding: Encoding) -> str:
    """The text of a tokenizer.json with tiktoken's ids for these ranks; see `read_ranks`."""
    first = max(ranks.values()) + 1
    after = {token: first + i for i, token in enumerate(encoding.following)}
    return _tree(ranks, encoding, {**encoding.special, **after})


def tekken_json(data: bytes) -> tuple[str, Encoding]:
    """The same for a tekken.json, which holds its pattern and, newer ones, its special tokens."""
    try:
        whole = json.loads(data)
        about = whole["config"]
        num_special, size = about["default_num_special_tokens"], about["default_vocab_size"]
        ranks = {
            base64.b64decode(token["token_bytes"]): token["rank"] + num_special
            for token in whole["vocab"][: size - num_special]
        }
        named = [t["token_str"] for t in whole.get("special_tokens") or ()] or _TEKKEN
        named = [*named, *(f"<SPECIAL_{i}>" for i in range(len(named), num_special))]
        pattern = str(about["pattern"])
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise UserError(f"it is no tekken.json: {type(error).__name__} {error}.") from error
    _check_ranks(ranks)
    special = {token: i for i, token in enumerate(named)}
    found = Encoding(pattern=pattern, special=special, end="</s>", bos="<s>")
    return _tree(ranks, found, special), found


# Files before version 11 do not name their special tokens.
_TEKKEN = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
]


def _check_ranks(ranks: Mapping[bytes, int]) -> None:
    if not ranks or len(set(ranks.values())) < len(ranks):
        raise UserError(f"its {len(ranks)} tokens do not have an id each.")
    if min(ranks.values()) < 0 or max(ranks.values()) >= LARGEST_VOCABULARY:
        raise UserError(f"its ids are not among 0 to {LARGEST_VOCABULARY - 1}.")
    lacking = sum(bytes([byte]) not in ranks for byte in range(256))
    if lacking:
        raise UserError(f"it lacks {lacking} of the 256 bytes, so that it cannot spell any text.")


def _tree(ranks: Mapping[bytes, int], encoding: Encoding, special: Mapping[str, int]) -> str:
    vocab = {byte_level_token(token): rank for token, rank in ranks.items()}
    taken = set(ranks.values())
    for token, index in special.items():
        if index in taken or token in vocab:
            raise UserError(f"the special token {token!r} has the id {index}, which is another's.")
        taken.add(index)
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token, index in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": encoding.normal_form} if encoding.normal_form else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": as_oniguruma(encoding.pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(),
            ],
        },
        "post_processor": prefix(encoding.bos, special[encoding.bos]) if encoding.bos else None,
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is taken whole, as in tiktoken
            "vocab": vocab | dict(special),
            "merges": _merges(ranks),
        },
    }
    return json.dumps(tree, ensure_ascii=False)


def _byte_level() -> dict[str, Any]:
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "ByteLevel", **flags}


def prefix(token: str, index: int) -> dict[str, Any]:
    """A post-processor that puts a special token before a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, b],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _merges(ranks: Mapping[bytes, int]) -> list[list[str]]:
    """Every pair of tokens that makes a token, by its id: tiktoken joins any such pair."""
    merges = []
    names = {rank: byte_level_token(token) for token, rank in ranks.items()}
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left = ranks.get(token[:cut])
            if left is not None and (right := ranks.get(token[cut:])) is not None:
                merges.append((rank, left, right))
    return [[names[left], names[right]] for _, left, right in sorted(merges)]


_ESCAPED = re.compile(r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.)", re.DOTALL)


def as_oniguruma(pattern: str) -> str:
    """A pattern of Rust's fancy-regex, which tiktoken uses, for Oniguruma, which `tokenizers` does.

    There ^ and $ stand at every line, and {m,n}+ repeats instead of being possessive, which is the
    same as {m,n} at the end of an alternative. Raises UserError for it elsewhere.
    """
    made, at, in_class = [], 0, 0
    while at < len(pattern):
        escaped = _ESCAPED.match(pattern, at)
        step = escaped[0] if escaped else pattern[at]
        at += len(step)
        if step == "[":
            in_class += 1
        elif step == "]":
            in_class -= 1
        elif not in_class and step in "^$":
            step = r"\A" if step == "^" else r"\z"
        elif not in_class and step == "}" and pattern[at : at + 1] == "+":
            if pattern[at + 1 : at + 2] not in ("", "|"):
                raise UserError(
                    f"the pattern has {{m,n}}+ before {pattern[at + 1 :]!r}, where it can change "
                    "what is found: write the group as (?>...)."
                )
            at += 1
        made.append(step)
    return "".join(made)
