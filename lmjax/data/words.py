"""Which tokens make one word: what is masked as a whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.data.pieces import byte_level_piece, sentencepiece_piece
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import CharacterTokenizer, TextTokenizer

# Kinds of characters. Bytes of which no character can be told are of a letter: most scripts lie
# outside ASCII. Ideographs are others: each is a word of its own, as in BERT's tokenizer.
_NONE, _SPACE, _LETTER, _DIGIT, _OTHER = range(5)
_IDEOGRAPHS = (("\u2e80", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"))


@dataclass(frozen=True)
class Words:
    """What each token id says of words.

    A token begins a word where a space stands before it or in it, where its first character is of
    another kind than the last one of the token before (letters, digits, others), and where it is
    neither letter nor digit. In WordPiece's vocabularies that is known of the token alone: what
    begins with "##" goes on with a word, and all others begin one.

    Attributes:
      first: kind of the token's first character that is no space, [V].
      last: kind of its last character, [V].
      begins: tokens that begin a word whatever is before them, bool [V].
      continues: tokens that never do, bool [V].
      choosable: tokens that may be masked, bool [V]: neither special tokens nor mere space.
    """

    first: np.ndarray
    last: np.ndarray
    begins: np.ndarray
    continues: np.ndarray
    choosable: np.ndarray

    def numbered(self, tokens_T: np.ndarray, segments_T: np.ndarray) -> np.ndarray:
        """The number of each token's word in the row, [T]; words end where segments do."""
        last_T = self.last[tokens_T]
        starts_T = self.begins[tokens_T]
        starts_T[1:] |= self.first[tokens_T[1:]] != last_T[:-1]
        starts_T &= ~self.continues[tokens_T]
        starts_T[1:] |= segments_T[1:] != segments_T[:-1]
        numbers: np.ndarray = np.cumsum(starts_T)
        return numbers


def words_of(tokenizer: TextTokenizer) -> Words:
    """Reads them off the tokenizer's vocabulary."""
    size = tokenizer.vocab_size
    pieces: list[bytes] = [b""] * size
    continues, special = np.zeros(size, bool), np.zeros(size, bool)
    wordpiece = False
    if isinstance(tokenizer, SubwordTokenizer):
        tree = json.loads(tokenizer.tokenizer_json)
        model = tree["model"]
        wordpiece = model.get("type") == "WordPiece"
        prefix = model.get("continuing_subword_prefix", "##") if wordpiece else ""
        byte_level = '"ByteLevel"' in json.dumps(tree.get("decoder"))
        for token, index in _tokens(model.get("vocab", {})):
            if wordpiece and token.startswith(prefix) and token != prefix:
                continues[index], token = True, token[len(prefix) :]
            pieces[index] = byte_level_piece(token) if byte_level else sentencepiece_piece(token)
        for added in tree.get("added_tokens", ()):
            if added["id"] < size:
                special[added["id"]] |= added.get("special", False)
                pieces[added["id"]] = added["content"].encode()
    elif isinstance(tokenizer, CharacterTokenizer):
        pieces[:-1] = [character.encode() for character in tokenizer.characters]
    else:
        pieces[:256] = [bytes([byte]) for byte in range(256)]
    special[tokenizer.end_id] = True
    texts = [piece.decode("utf-8", "surrogateescape") for piece in pieces]
    first = np.array([_kind(text.lstrip()[:1] or text[:1]) for text in texts], np.int8)
    last = np.array([_kind(text[-1:]) for text in texts], np.int8)
    begins = np.array([text[:1].isspace() for text in texts], bool)
    begins |= (first == _OTHER) | (first == _NONE) | special
    if wordpiece:
        begins = ~continues
    return Words(
        first=first,
        last=last,
        begins=begins,
        continues=continues,
        choosable=~special & (first != _SPACE) & (first != _NONE),
    )


def _tokens(vocab: Any) -> list[tuple[str, int]]:
    """(token, id) of a vocabulary: a dict, or in Unigram models a list of (token, score)."""
    if isinstance(vocab, dict):
        return list(vocab.items())
    return [(row[0], i) for i, row in enumerate(vocab)]


def _kind(character: str) -> int:
    if not character:
        return _NONE
    if character.isspace():
        return _SPACE
    if character.isdigit():
        return _DIGIT
    if any(low <= character <= high for low, high in _IDEOGRAPHS):
        return _OTHER
    lone = "\ud800" <= character <= "\udfff"  # a byte of a character that is cut
    return _LETTER if lone or character.isalpha() or character == "_" else _OTHER
