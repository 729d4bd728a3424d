"""Text to token ids and back: bytes, characters, and subwords of Hugging Face `tokenizers`.

Every tokenizer keeps one id that no text spells: `end_id`, which ends a document.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lmjax.data.pieces import join, sha256
from lmjax.data.subword import SubwordTokenizer
from lmjax.errors import UserError, did_you_mean


class TextTokenizer(Protocol):
    """A `core.Tokenizer` that can end a document and say how much text a token stands for.

    `decode` takes any integers: ids that stand for no text (the document's end) give nothing, and
    ids or bytes that spell no character give U+FFFD. Says all of `core.Tokenizer` again, as
    importing that would bring jax into processes that only prepare text.
    """

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text; raises UserError for what the vocabulary cannot spell."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of any sequence of ids."""
        ...

    def to_json(self) -> str:
        """All that is needed to make it again; see `tokenizer_from_json`."""
        ...

    @property
    def end_id(self) -> int:
        """The id that follows a document's last token; `encode` never returns it."""
        ...

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids of a text that a model is to read: what its files put around a text is there."""
        ...

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text behind each id, float32 [V]; 0 for the document's end."""
        ...

    @property
    def hash(self) -> str:
        """Names what this tokenizer does: sha256 of `to_json()`."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; 256 ends a document."""

    vocab_size: int = field(default=257, init=False)
    end_id: int = field(default=256, init=False)

    def encode(self, text: str) -> np.ndarray:
        """The bytes of the text, int32 [bytes]; raises UserError for half a surrogate pair."""
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        except UnicodeEncodeError as error:
            raise UserError(f"not a text that UTF-8 can hold: {error}. Leave it out.") from error

    def encode_prompt(self, text: str) -> np.ndarray:
        """The same."""
        return self.encode(text)

    def decode(self, ids: Any) -> str:
        """The text of the bytes."""
        return join(ids, [bytes([byte]) for byte in range(256)] + [b""])

    def token_bytes(self) -> np.ndarray:
        """One each, and none for the document's end."""
        return np.array([1] * 256 + [0], np.float32)

    def to_json(self) -> str:
        """See `tokenizer_from_json`."""
        return json.dumps({"kind": "bytes"})

    @functools.cached_property
    def hash(self) -> str:
        """Sha256 of `to_json()`."""
        return sha256(self.to_json())


@dataclass(frozen=True)
class CharacterTokenizer:
    """Each character an id, in the order of `characters`; the last id ends a document."""

    characters: str

    @property
    def vocab_size(self) -> int:
        """The characters and the document's end."""
        return len(self.characters) + 1

    @property
    def end_id(self) -> int:
        """The last id."""
        return len(self.characters)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """Code point to id, -1 where the character is not known."""
        codes = _code_points(self.characters)
        table = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
        table[codes] = np.arange(len(codes))
        return table

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [characters]; raises UserError for a character outside the vocabulary."""
        codes = _code_points(text)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if ids.min(initial=0) < 0:
            offset = int(np.argmin(ids))
            raise UserError(
                f"the character {text[offset]!r} (U+{ord(text[offset]):04X}) at offset {offset} is "
                f"not among the {len(self.characters)} characters of the corpus. Leave it out, or "
                "train with vocabulary=Bytes() or BPE(), which spell any text."
            )
        return ids

    def encode_prompt(self, text: str) -> np.ndarray:
        """The same."""
        return self.encode(text)

    def decode(self, ids: Any) -> str:
        """The characters of the ids."""
        return join(ids, [character.encode() for character in self.characters] + [b""])

    def token_bytes(self) -> np.ndarray:
        """1 to 4 each, and none for the document's end."""
        return np.array([len(c.encode()) for c in self.characters] + [0], np.float32)

    def to_json(self) -> str:
        """See `tokenizer_from_json`."""
        return json.dumps({"kind": "characters", "characters": self.characters})

    @functools.cached_property
    def hash(self) -> str:
        """Sha256 of `to_json()`."""
        return sha256(self.to_json())


def tokenizer_from_json(text: str) -> TextTokenizer:
    """Inverse of `to_json` of every tokenizer here; raises UserError where it is damaged."""
    damaged = "the saved tokenizer is damaged: "
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{damaged}{error}.") from error
    kind = tree.get("kind") if isinstance(tree, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "characters":
        characters = tree.get("characters")
        if not isinstance(characters, str) or len(set(characters)) < len(characters):
            raise UserError(f"{damaged}its `characters` are not all different ones.")
        return CharacterTokenizer(characters)
    if kind == "subword":
        sizes = [tree.get("vocab_size"), tree.get("end_id")]
        if not all(type(size) is int for size in sizes) or "tokenizer" not in tree:
            raise UserError(f"{damaged}it lacks its tokenizer, vocab_size or end_id.")
        made = SubwordTokenizer(
            tokenizer_json=json.dumps(tree["tokenizer"], ensure_ascii=False),
            vocab_size=tree["vocab_size"],
            end_id=tree["end_id"],
            special_tokens=_pairs(tree, "special_tokens"),
            chat_templates=_pairs(tree, "chat_templates"),
        )
        try:
            made.check()
        except UserError as error:
            raise UserError(f"{damaged}{error}") from error
        return made
    raise UserError(
        f"the saved tokenizer is of the kind {kind!r}."
        + did_you_mean(str(kind), ["bytes", "characters", "subword"])
    )


def _pairs(tree: dict[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    held = tree.get(name, {})
    if not isinstance(held, dict) or not all(isinstance(text, str) for text in held.values()):
        raise UserError(f"the saved tokenizer is damaged: its {name} are not texts by name.")
    return tuple(held.items())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
