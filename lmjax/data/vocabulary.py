"""Which vocabulary a corpus is read with: what a config names before there is any data.

`learn` turns one of these into a tokenizer; `vocab_size` is known before, where it can be.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lmjax.data.cache import cache_folder, read_sealed, write_sealed
from lmjax.data.pieces import LARGEST_VOCABULARY
from lmjax.data.pretrained import read_tiktoken, read_tokenizer
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tiktoken import Encoding, encoding
from lmjax.data.tokenizer import ByteTokenizer, CharacterTokenizer, TextTokenizer
from lmjax.errors import UserError


class Vocabulary(Protocol):
    """A frozen, hashable description of a tokenizer."""

    @property
    def vocab_size(self) -> int | None:
        """How many ids there will be; None where only the corpus tells."""
        ...

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """The tokenizer for a corpus, given the texts of its two splits."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """UTF-8 bytes and the document's end: 257 ids, spells any text."""

    @property
    def vocab_size(self) -> int:
        """Always 257."""
        return 257

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """Learns nothing."""
        return ByteTokenizer()


@dataclass(frozen=True, kw_only=True)
class Characters:
    """The sorted characters of the whole corpus, both splits, and the document's end."""

    @property
    def vocab_size(self) -> None:
        """Only the corpus tells."""
        return None

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """Collects the characters."""
        characters = set().union(*map(set, train), *map(set, valid))
        return CharacterTokenizer("".join(sorted(characters)))


@dataclass(frozen=True, kw_only=True)
class BPE:
    """Byte-level byte-pair encoding, learned on the training split alone and cached on disk.

    Source: Sennrich et al., arXiv:1508.07909, over bytes as in GPT-2. The last id,
    `vocab_size - 1`, ends a document. A small corpus may not have enough repeated pairs: ids
    between its last merge and the document's end then stay unused.
    """

    vocab_size: int = 1024

    def __post_init__(self) -> None:
        """Refuses a vocabulary that cannot hold the bytes."""
        if self.vocab_size < 257:
            raise UserError(
                f"vocab_size is {self.vocab_size}; byte-level BPE needs at least 257 ids: 256 "
                "bytes and the document's end. Use Characters() for a smaller vocabulary."
            )
        if self.vocab_size > LARGEST_VOCABULARY:
            raise UserError(
                f"vocab_size is {self.vocab_size}: must be at most {LARGEST_VOCABULARY}."
            )

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """Learns the merges, or reads them from the cache."""
        key = hashlib.sha256(f"byte-level bpe {self.vocab_size}".encode())
        for text in train:
            key.update(hashlib.sha256(text.encode()).digest())
        file = cache_folder() / "tokenizers" / f"{key.hexdigest()}.txt"
        if (learned := read_sealed(file)) is None:
            learned = self._train(train)
            write_sealed(file, learned)
        return SubwordTokenizer(
            tokenizer_json=learned,
            vocab_size=self.vocab_size,
            end_id=self.vocab_size - 1,
        )

    def _train(self, texts: Sequence[str]) -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - 1,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return str(tokenizer.to_str())


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A published tokenizer: tokenizer.json, SentencePiece's .model, tekken.json or .tiktoken.

    Args:
      path: the file, or a folder that holds one, with what `transformers` writes beside it.
      end: the token that ends a document; None for the eos_token that the files name, or else
        "<|endoftext|>".
    """

    path: str
    end: str | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the highest id in the file."""
        return read_tokenizer(self.path, self.end).vocab_size

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """Reads the file."""
        return read_tokenizer(self.path, self.end)


class _Tokenized(Protocol):
    """A data set with a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The tokenizer of another data set, whatever it was learned of, chat template included.

    So plain text and conversations can be mixed, and texts of which one alone made the vocabulary.

    Args:
      of: the data set; a frozen dataclass of hashable fields, as all are but mixtures.
    """

    of: _Tokenized

    def __post_init__(self) -> None:
        """Refuses a data set that cannot be told from others by its hash."""
        try:
            hash(self.of)
        except TypeError as error:
            raise UserError(
                f"Shared takes the tokenizer of a data set of its own, and {type(self.of).__name__}"
                " holds several: name one of them."
            ) from error

    @property
    def vocab_size(self) -> int:
        """The other data set's."""
        return self.of.vocab_size

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """Takes the other data set's."""
        return self.of.tokenizer


@dataclass(frozen=True, kw_only=True)
class Tiktoken:
    """A rank file of tiktoken, which holds neither the cutting of words nor special tokens.

    Args:
      path: the file, of any name.
      encoding: the published encoding that it belongs to, "cl100k_base" or another of
        `lmjax.data.tiktoken.ENCODINGS`; empty for what follows.
      pattern: the regular expression that cuts a text into words, as tiktoken takes it.
      special: special tokens; their ids follow the ranks.
      end: the one of them that ends a document.
    """

    path: str
    encoding: str = ""
    pattern: str = ""
    special: tuple[str, ...] = ("<|endoftext|>",)
    end: str = "<|endoftext|>"

    def __post_init__(self) -> None:
        """Refuses an unknown encoding, and two ways to cut words or none."""
        if bool(self.encoding) == bool(self.pattern):
            raise UserError(
                f"encoding is {self.encoding!r} and pattern {self.pattern!r}: give one of them."
            )
        if self.encoding:
            encoding(self.encoding)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._tokenizer.vocab_size

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """Reads the file."""
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> SubwordTokenizer:
        known = (
            encoding(self.encoding)
            if self.encoding
            else Encoding(pattern=self.pattern, following=tuple(self.special), end=self.end)
        )
        return read_tiktoken(self.path, known)
