"""Text to token ids and back: bytes, characters, and subwords of Hugging Face `tokenizers`.

Every tokenizer keeps one id that no text spells: `end_id`, which ends a document.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lmjax.core import Tokenizer
from lmjax.errors import UserError, did_you_mean

LARGEST_VOCABULARY = 2**24  # ids; a hundred times what any tokenizer has
LOST = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer(Tokenizer, Protocol):
    """A tokenizer that can also end a document and say how much text a token stands for.

    `decode` takes any integers: ids that stand for no text (the document's end) give nothing, and
    ids or bytes that spell no character give U+FFFD.
    """

    @property
    def end_id(self) -> int:
        """The id that follows a document's last token; `encode` never returns it."""
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

    def decode(self, ids: Any) -> str:
        """The text of the bytes."""
        return _join(ids, [bytes([byte]) for byte in range(256)] + [b""])

    def token_bytes(self) -> np.ndarray:
        """One each, and none for the document's end."""
        return np.array([1] * 256 + [0], np.float32)

    def to_json(self) -> str:
        """See `tokenizer_from_json`."""
        return json.dumps({"kind": "bytes"})

    @functools.cached_property
    def hash(self) -> str:
        """Sha256 of `to_json()`."""
        return _sha256(self.to_json())


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

    def decode(self, ids: Any) -> str:
        """The characters of the ids."""
        return _join(ids, [character.encode() for character in self.characters] + [b""])

    def token_bytes(self) -> np.ndarray:
        """1 to 4 each, and none for the document's end."""
        return np.array([len(c.encode()) for c in self.characters] + [0], np.float32)

    def to_json(self) -> str:
        """See `tokenizer_from_json`."""
        return json.dumps({"kind": "characters", "characters": self.characters})

    @functools.cached_property
    def hash(self) -> str:
        """Sha256 of `to_json()`."""
        return _sha256(self.to_json())


@dataclass(frozen=True, kw_only=True)
class SubwordTokenizer:
    """Any tokenizer of Hugging Face `tokenizers`, given as the text of its tokenizer.json.

    Special tokens that occur literally in a text are spelled out, never taken for control.
    Departure: `token_bytes` is exact for byte-level vocabularies (GPT-2, Llama 3, Qwen); where the
    tokenizer drops or adds characters (lower-casing, SentencePiece's leading space), it counts the
    characters of the token and not of the text.
    """

    tokenizer_json: str
    vocab_size: int
    end_id: int

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import tokenizers

        with explained("the tokenizer cannot be read"):
            tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.tokenizer_json).get("decoder"))

    def _ids_of(self, text: str) -> np.ndarray:
        with explained("the tokenizer cannot spell the text"):
            encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
            return np.array(encoded.ids, np.int32)

    @functools.cached_property
    def _exact(self) -> bool:
        """Whether the tokens of a text hold all of its bytes."""
        return self._byte_level and self._tokenizer.normalizer is None

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes that each id stands for."""
        pieces = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            pieces[index] = _byte_level_piece(token) if self._byte_level else _piece(token)
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            pieces[index] = b"" if added.special else added.content.encode()
        pieces[self.end_id] = b""
        return pieces

    def encode(self, text: str) -> np.ndarray:
        """Ids without any special token, int32 [tokens]; raises UserError for what it cannot spell.

        A byte-level vocabulary that lacks bytes drops them, which is an error here.
        """
        ids = self._ids_of(text)
        lost = len(text.encode()) - int(self.token_bytes()[ids].sum()) if self._exact else 0
        if lost > 0 or (text.strip() and not len(ids)):
            raise UserError(
                f"the tokenizer drops {lost or len(text)} bytes of the text, for which it has no "
                "token. Give a tokenizer that spells any text."
            )
        return ids

    def decode(self, ids: Any) -> str:
        """The text of the ids, special tokens left out."""
        if self._byte_level:
            return _join(ids, self._pieces)
        known = [i for i in np.asarray(ids).reshape(-1).tolist() if 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def token_bytes(self) -> np.ndarray:
        """Bytes of each token's own text; special tokens have none."""
        return self._lengths

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], np.float32)

    def check(self) -> None:
        """Raises UserError where ids are ambiguous, out of range, or differ from call to call."""
        if not 0 < self.vocab_size <= LARGEST_VOCABULARY:
            raise UserError(f"vocab_size is {self.vocab_size}: give 1 to {LARGEST_VOCABULARY}.")
        if not 0 <= self.end_id < self.vocab_size:
            raise UserError(f"end_id is {self.end_id}, beyond the {self.vocab_size} ids.")
        token_of: dict[int, str] = {}
        for token, index in sorted(self._tokenizer.get_vocab(with_added_tokens=True).items()):
            if index >= self.vocab_size:
                raise UserError(
                    f"the token {token!r} has the id {index}, beyond the {self.vocab_size} ids."
                )
            if index in token_of:
                raise UserError(
                    f"the tokens {token_of[index]!r} and {token!r} have one id, {index}."
                )
            token_of[index] = token
        if getattr(self._tokenizer.model, "dropout", None):
            raise UserError(
                "its dropout is not 0: the same text would give other ids each time. Set "
                "model.dropout to null in the file."
            )
        end, spelled = token_of.get(self.end_id, ""), np.zeros(0, np.int32)
        with contextlib.suppress(UserError):  # what cannot be spelled is what is wanted
            spelled = self._ids_of(end)
        if self.end_id in spelled:
            raise UserError(
                f"a text can spell the token {end!r}, which is to end documents: give a special "
                "token, that no text spells."
            )

    def to_json(self) -> str:
        """See `tokenizer_from_json`."""
        return json.dumps(
            {
                "kind": "subword",
                "vocab_size": self.vocab_size,
                "end_id": self.end_id,
                "tokenizer": json.loads(self.tokenizer_json),
            }
        )

    @functools.cached_property
    def hash(self) -> str:
        """Sha256 of `to_json()`."""
        return _sha256(self.to_json())


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


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Makes a UserError of what `tokenizers` raises: bare `Exception`s, and panics beside them."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {str(error).partition(chr(10))[0]}.") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _join(ids: Any, pieces: list[bytes]) -> str:
    flat = np.asarray(ids).reshape(-1).astype(np.int64).tolist()
    lost = LOST.encode()
    joined = b"".join(pieces[i] if 0 <= i < len(pieces) else lost for i in flat)
    return joined.decode("utf-8", "replace")


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The printable stand-ins that byte-level vocabularies write for bytes.

    Source: GPT-2's `bytes_to_unicode`, as in `tokenizers` pre_tokenizers.ByteLevel.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_piece(token: str) -> bytes:
    table = _byte_of_character()
    return bytes(table[character] for character in token if character in table)


def _piece(token: str) -> bytes:
    """A token of SentencePiece or WordPiece as the text that it adds."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    if byte:
        return bytes.fromhex(byte[1])
    return token.removeprefix("##").replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
