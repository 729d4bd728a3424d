"""Which vocabulary a corpus is read with: what a config names before there is any data.

`learn` turns one of these into a tokenizer; `vocab_size` is known before, where it can be.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmjax.data.cache import cache_folder, read_sealed, write_sealed
from lmjax.data.tokenizer import (
    LARGEST_VOCABULARY,
    ByteTokenizer,
    CharacterTokenizer,
    SubwordTokenizer,
    TextTokenizer,
    explained,
    tokenizer_from_json,
)
from lmjax.errors import UserError, did_you_mean


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
    """A tokenizer.json as it is.

    Args:
      path: the file, or a folder that holds one.
      end: the token that ends a document; "</s>" for Llama 2, "<|end_of_text|>" for Llama 3.
    """

    path: str
    end: str = "<|endoftext|>"

    @property
    def vocab_size(self) -> int:
        """One more than the highest id in the file."""
        return _read_tokenizer(self.path, self.end).vocab_size

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """Reads the file."""
        return _read_tokenizer(self.path, self.end)


@functools.lru_cache(maxsize=4)
def _read_tokenizer(path: str, end: str) -> SubwordTokenizer:
    import tokenizers

    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        near = [f.as_posix() for f in file.parent.glob("*.json")]
        raise UserError(f"no tokenizer at {file.as_posix()!r}." + did_you_mean(str(file), near))
    try:
        text = file.read_text("utf-8")
        if text.startswith('{"kind":') and isinstance(
            made := tokenizer_from_json(text), SubwordTokenizer
        ):
            return made  # the tokenizer of a run, with the end of its own
        with explained("it cannot be read"):
            ids = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
            special = [t["content"] for t in json.loads(text).get("added_tokens", ())]
    except (OSError, ValueError) as error:  # UserErrors and broken UTF-8 among them
        raise UserError(
            f"{file} is no tokenizer.json of Hugging Face `tokenizers`: {error} Save one with "
            "tokenizer.save(path)."
        ) from error
    if end not in ids:
        raise UserError(f"{file} has no token {end!r}: set `end`." + did_you_mean(end, special))
    made = SubwordTokenizer(tokenizer_json=text, vocab_size=max(ids.values()) + 1, end_id=ids[end])
    try:
        made.check()
    except UserError as error:
        raise UserError(f"{file}, its end {end!r}: {error}") from error
    return made
