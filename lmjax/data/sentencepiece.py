"""SentencePiece's .model files as a tokenizer.json, which needs no SentencePiece to be used.

Source: Kudo and Richardson, arXiv:1808.06226; the fields of its sentencepiece_model.proto. Every
rule of the library becomes a rule of `tokenizers`, in the library's order: character map, spaces,
the leading space, symbols of the user, then the model over words.

Departures: the character map is applied to grapheme clusters, not to characters, which differs for
some sequences of marks and joiners (in 2 of 23,324 lines in 28 languages, both Bengali); Unigram
adds in float64, not in float32, and may choose another of two segmentations that are equally
likely; a merge of equal rank at two places that overlap is made in the order of the pairs' ids, not
from the left; a text that is nothing but one symbol of the user gets no leading space; an unknown
character decodes to nothing, not to U+2047. A model that needs what `tokenizers` lacks is refused.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmjax.data.pieces import SPACE
from lmjax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
_ALL = 2**31  # more spaces than a text begins with
_KINDS = {UNIGRAM: "unigram", BPE: "BPE", 3: "word", 4: "character"}


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What a .model file says.

    Attributes:
      pieces: text, score and kind (NORMAL, ...) of each id.
      kind: UNIGRAM or BPE.
      character_map: the compiled rules of normalization; empty for none.
      leading_space: a text begins with a space that it does not have.
      one_space: runs of spaces count as one, and those at a text's ends as none.
    """

    pieces: tuple[tuple[str, float, int], ...]
    kind: int
    character_map: bytes
    leading_space: bool
    one_space: bool
    byte_fallback: bool
    special_tokens: tuple[tuple[str, str], ...]

    def to_json(self) -> str:
        """The text of a tokenizer.json that spells what SentencePiece spells."""
        unknown = next(i for i, piece in enumerate(self.pieces) if piece[2] == UNKNOWN)
        if self.kind == BPE:
            model: dict[str, Any] = {
                "type": "BPE",
                "dropout": None,
                "unk_token": self.pieces[unknown][0],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": self.byte_fallback,
                "ignore_merges": False,
                "vocab": {text: i for i, (text, _, _) in enumerate(self.pieces)},
                "merges": _merges(self.pieces),
            }
        else:
            model = {
                "type": "Unigram",
                "unk_id": unknown,
                "vocab": [[text, score] for text, score, _ in self.pieces],
                "byte_fallback": self.byte_fallback,
            }
        spaces = _ALL if self.one_space else int(self.leading_space)
        start = {"type": "Strip", "content": " ", "start": spaces, "stop": 0}
        tree = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "normalizer": {"type": "Sequence", "normalizers": self._normalizers()},
            "pre_tokenizer": self._words(),
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    *([start] if spaces else []),
                ],
            },
            "model": model,
        }
        return json.dumps(tree, ensure_ascii=False)

    def _added_tokens(self) -> list[dict[str, Any]]:
        """Symbols of the user are found in the normalized text, as the library finds them.

        So one with a space in it never is: the text has another character there.
        """
        return [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": kind == USER,
                "special": kind != USER,
            }
            for i, (text, _, kind) in enumerate(self.pieces)
            if kind in (UNKNOWN, CONTROL) or (kind == USER and " " not in text)
        ]

    def _normalizers(self) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = []
        if self.character_map:
            compiled = base64.b64encode(self.character_map).decode()
            steps.append({"type": "Precompiled", "precompiled_charsmap": compiled})
        if self.one_space:
            steps.append(_replace({"Regex": r"\A +"}, ""))
            steps.append(_replace({"Regex": " {2,}"}, " "))
        steps.append(_replace({"String": " "}, SPACE))
        if self.one_space:
            steps.append(_replace({"Regex": rf"{SPACE}+\z"}, ""))
        if self.leading_space:
            # The same rules are used on the symbols of the user, which are to stay as they are.
            symbols = [re.escape(text) for text, _, kind in self.pieces if kind == USER]
            alone = rf"(?!(?:{'|'.join(symbols)})\z)" if symbols else ""
            steps.append(_replace({"Regex": rf"\A{alone}(?=[\s\S])"}, SPACE))
        return steps

    def _words(self) -> dict[str, Any] | None:
        """Cuts before runs of spaces where no piece reaches over such a cut; it is only faster."""
        over = re.compile(f"[^{SPACE}]{SPACE}")
        if any(over.search(text) for text, _, kind in self.pieces if kind == NORMAL):
            return None
        pattern = {"Regex": f"{SPACE}*[^{SPACE}]+|{SPACE}+"}
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def read_sentencepiece(data: bytes) -> SentencePieceModel:
    """Reads the bytes of a .model file.

    Raises UserError where it is damaged, or needs what cannot be written as a tokenizer.json:
    models of words or characters, spaces as suffixes, pieces marked unused, a map for decoding.
    """
    damaged = "it is no SentencePiece model: "
    try:
        whole = _message(data)
        pieces = tuple(_piece(piece) for piece in whole.get(1, ()))
        trainer, normalizer, decoding = (_message(whole.get(i, [b""])[-1]) for i in (2, 3, 5))
        kind = int(trainer.get(3, [UNIGRAM])[-1])
        character_map = bytes(normalizer.get(2, [b""])[-1])
        names = {role: _text(trainer, field, default) for role, field, default in _ROLES}
    except (ValueError, TypeError, struct.error, IndexError) as error:
        raise UserError(f"{damaged}{error}.") from error
    texts = [text for text, _, _ in pieces]
    if not pieces or len(set(texts)) < len(texts) or "" in texts:
        raise UserError(f"{damaged}its {len(texts)} pieces are not all different ones.")
    if sum(kind == UNKNOWN for _, _, kind in pieces) != 1:
        raise UserError(f"{damaged}it has not just one piece for what is unknown.")
    byte_fallback = bool(trainer.get(35, [0])[-1])
    if byte_fallback and not {f"<0x{byte:02X}>" for byte in range(256)} <= set(texts):
        raise UserError(f"{damaged}it falls back to bytes, and lacks some.")
    refused = {
        f"a model of {_KINDS.get(kind, str(kind))}s": kind not in (UNIGRAM, BPE),
        "spaces as suffixes (treat_whitespace_as_suffix)": bool(trainer.get(24, [0])[-1]),
        "spaces as they are (escape_whitespaces=false)": not normalizer.get(5, [1])[-1],
        "symbols of the user that end with a space": bool(normalizer.get(4, [1])[-1])
        and any(kind == USER and text.endswith(SPACE) for text, _, kind in pieces),
        "pieces marked UNUSED": any(kind == UNUSED for _, _, kind in pieces),
        "a map of characters for decoding (denormalizer_spec)": bool(decoding.get(2, [b""])[-1]),
    }
    for what, found in refused.items():
        if found:
            raise UserError(
                f"it needs {what}, which is not supported. Supported are unigram and BPE models "
                "with spaces as prefixes; a tokenizer.json of the same vocabulary will do too."
            )
    controls = {text for text, _, kind in pieces if kind in (CONTROL, UNKNOWN)}
    return SentencePieceModel(
        pieces=pieces,
        kind=kind,
        character_map=character_map,
        leading_space=bool(normalizer.get(3, [1])[-1]),
        one_space=bool(normalizer.get(4, [1])[-1]),
        byte_fallback=byte_fallback,
        special_tokens=tuple((role, name) for role, name in names.items() if name in controls),
    )


_ROLES = (
    ("bos_token", 46, "<s>"),
    ("eos_token", 47, "</s>"),
    ("unk_token", 45, "<unk>"),
    ("pad_token", 48, "<pad>"),
)


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _merges(pieces: tuple[tuple[str, float, int], ...]) -> list[list[str]]:
    """Every pair that makes a piece, the best piece first.

    SentencePiece joins any two neighbours whose text is a piece, so all cuts of a piece are merges,
    and not just the one that made it. Only NORMAL pieces are joined or made by joining.
    """
    ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind == NORMAL}
    merges = []
    for text, score, kind in pieces:
        if kind != NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-score, ids[text], left, right))
    return [[pieces[left][0], pieces[right][0]] for _, _, left, right in sorted(merges)]


def _piece(data: Any) -> tuple[str, float, int]:
    fields = _message(data)
    score = struct.unpack("<f", fields.get(2, [bytes(4)])[-1])[0]
    return _text(fields, 1, ""), score, int(fields.get(3, [NORMAL])[-1])


def _text(fields: dict[int, list[Any]], field: int, default: str) -> str:
    return bytes(fields[field][-1]).decode() if field in fields else default


def _message(data: Any) -> dict[int, list[Any]]:
    """The fields of a protocol buffer's message: integers, or bytes, in their order."""
    if not isinstance(data, bytes):
        raise ValueError("a number stands where a message should")
    fields: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Source: protobuf.dev, "Encoding": tag, then a varint, 8, n or 4 bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number is longer than ten bytes")

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        sizes = {1: lambda: 8, 2: varint, 5: lambda: 4}
        if tag & 7 not in sizes:
            raise ValueError(f"a field has the unknown wire type {tag & 7}")
        size = sizes[tag & 7]()
        if at + size > len(data):
            raise ValueError(f"it ends {at + size - len(data)} bytes early")
        yield tag >> 3, data[at : at + size]
        at += size
