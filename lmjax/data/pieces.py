"""What all tokenizers share: bytes behind ids, and errors of the library that spells them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmjax.errors import UserError

LARGEST_VOCABULARY = 2**24  # ids; a hundred times what any tokenizer has
LOST = "\N{REPLACEMENT CHARACTER}"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Makes a UserError of what `tokenizers` raises: bare `Exception`s, and panics beside them."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {str(error).partition(chr(10))[0]}.") from error


def sha256(text: str) -> str:
    """The hexadecimal hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def join(ids: Any, pieces: list[bytes]) -> str:
    """The text of the pieces of any integers; U+FFFD for ids beyond them and for broken UTF-8."""
    flat = np.asarray(ids).reshape(-1).astype(np.int64).tolist()
    lost = LOST.encode()
    joined = b"".join(pieces[i] if 0 <= i < len(pieces) else lost for i in flat)
    return joined.decode("utf-8", "replace")


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The printable stand-ins that byte-level vocabularies write for bytes.

    Source: GPT-2's `bytes_to_unicode`, as in `tokenizers` pre_tokenizers.ByteLevel.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def byte_level_piece(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary."""
    table = byte_of_character()
    return bytes(table[character] for character in token if character in table)


def byte_level_token(piece: bytes) -> str:
    """Inverse of `byte_level_piece`."""
    return piece.decode("latin-1").translate(_character_of_byte())


@functools.cache
def _character_of_byte() -> dict[int, str]:
    return {byte: character for character, byte in byte_of_character().items()}


def sentencepiece_piece(token: str) -> bytes:
    """A token of SentencePiece as the text that it adds."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()
