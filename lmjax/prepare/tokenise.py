"""Records to a token store: a tokenizer learned from a sample or published, then shard by shard.

A store (lmjax/data/store.py) is made by `learn`, `write` for each shard of records in any order and
in any process, and `seal_store`.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmjax.data.pieces import LARGEST_VOCABULARY, explained
from lmjax.data.sentencepiece import read_sentencepiece
from lmjax.data.store import write_shard
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import TextTokenizer, tokenizer_from_json
from lmjax.data.vocabulary import BPE, Characters, Vocabulary
from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.encoders import ENGINES, Encoder, Engine
from lmjax.prepare.stage import Result, set_aside


@dataclass(frozen=True, kw_only=True)
class Unigram:
    """A unigram language model, learned by SentencePiece from a sample; spells any text.

    Source: Kudo, arXiv:1804.10959; bytes stand for characters that the sample lacks, and texts stay
    as they are but for U+2581, which stands for a space. The last id ends a document; a small
    sample may leave ids before it unused. `tokenizers` has a trainer too, whose result differs from
    run to run.
    """

    vocab_size: int = 1024

    def __post_init__(self) -> None:
        """Refuses a vocabulary that cannot hold the bytes."""
        if not 259 <= self.vocab_size <= LARGEST_VOCABULARY:
            raise UserError(
                f"vocab_size is {self.vocab_size}: give 259 (bytes, the unknown, a piece, the end "
                f"of a document) to {LARGEST_VOCABULARY}."
            )

    def learn(self, train: Sequence[str], valid: Sequence[str]) -> TextTokenizer:
        """Learns the pieces from the first of the two."""
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(f"Unigram needs `pip install sentencepiece`: {error}.") from error
        model = io.BytesIO()
        with explained("no unigram vocabulary can be learned"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for text in train for line in text.split("\n") if line),
                model_writer=model,
                model_type="unigram",
                vocab_size=self.vocab_size - 1,
                hard_vocab_limit=False,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                max_sentence_length=1 << 20,
                input_sentence_size=0,
                num_threads=4,  # whatever the machine has: sums are made in parts
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                minloglevel=2,
            )
        return SubwordTokenizer(
            tokenizer_json=read_sentencepiece(model.getvalue()).to_json(),
            vocab_size=self.vocab_size,
            end_id=self.vocab_size - 1,
        )


@dataclass(frozen=True, kw_only=True)
class Tokenise:
    """The last stage of a preparation: its config, and how a shard of records becomes tokens.

    Args:
      vocabulary: `BPE(vocab_size=...)` or `Unigram(vocab_size=...)`, learned from the sample;
        `Pretrained(path=...)`, `Tiktoken(...)`, `Bytes()`.
      sample_fraction: the share of the records that a vocabulary is learned from; a record is in it
        by the sha256 of its id, wherever it lies.
      sample_bytes: how much text that is at most; records of the lowest hashes stay.
      engine: what encodes, see `encoders.Encoder`: the ids are those of the vocabulary's own
        tokenizer whichever it is.
      checked_documents: how many documents of every shard are encoded by that as well.
    """

    vocabulary: Vocabulary = field(default_factory=lambda: BPE(vocab_size=32768))
    sample_fraction: float = 1.0
    sample_bytes: int = 100_000_000
    engine: Engine = "auto"
    checked_documents: int = 32

    def __post_init__(self) -> None:
        """Refuses values that cannot work."""
        if self.engine not in ENGINES:
            raise UserError(f"engine is {self.engine!r}." + did_you_mean(self.engine, ENGINES))
        if not 0 < self.sample_fraction <= 1:
            raise UserError(f"sample_fraction is {self.sample_fraction}: give one in (0, 1].")
        if self.sample_bytes < 1 or self.checked_documents < 0:
            raise UserError(
                f"sample_bytes is {self.sample_bytes}, checked_documents {self.checked_documents}: "
                "give at least 1 and 0."
            )

    @property
    def learns(self) -> bool:
        """Whether the vocabulary depends on the records at all."""
        return isinstance(self.vocabulary, BPE | Unigram | Characters)

    def learn(self, files: Iterable[str | Path | pa.Table]) -> TextTokenizer:
        """The tokenizer for records in parquet files (or tables), which are read one at a time.

        Neither the order of the files nor how records lie in them changes it. A published
        vocabulary reads none of them.
        """
        if not self.learns:
            return self.vocabulary.learn([], [])
        limit, size = int(self.sample_fraction * 2**64), 0
        kept: list[tuple[int, str, bytes]] = []
        seen = 0
        for file in files:
            table = (
                file if isinstance(file, pa.Table) else pq.read_table(file, columns=["id", "text"])
            )
            seen += len(table)
            for name, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
                rank = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
                if rank >= limit:
                    continue
                heapq.heappush(kept, (-rank, name, data := text.encode()))
                size += len(data)
                while size - len(kept[0][2]) >= self.sample_bytes:  # without the highest
                    size -= len(heapq.heappop(kept)[2])
        if not seen:
            raise UserError(
                "no record is left to learn a vocabulary from: each was dropped or quarantined, or "
                "is for validation. report.md says at which stage, and why."
            )
        if not kept:
            raise UserError(
                f"no record is in the sample that the vocabulary is learned from: sample_fraction "
                f"is {self.sample_fraction}. Raise it, or give records."
            )
        texts = [data.decode() for _, _, data in sorted(kept, reverse=True)]
        kept.clear()  # or else memory holds the sample twice while it is learned from
        return self.vocabulary.learn(texts, [])

    def write(
        self, records: pa.Table, *, tokenizer: TextTokenizer | str, folder: str | Path, number: int
    ) -> Result:
        """Writes the tokens of some records as shard `number` of the store in `folder`.

        Every document ends with the tokenizer's `end_id`. What the vocabulary cannot spell is
        quarantined. `tokenizer` is the one that `learn` gave, or its `to_json()`. Counted are
        documents, tokens and UTF-8 bytes of text, and documents by the engine that encoded them.
        """
        text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
        encoder = _encoder(text, self.engine, self.checked_documents)
        names, texts = records["id"].to_pylist(), records["text"].to_pylist()
        bad: dict[str, str] = {}
        rows, engine = _encode(encoder, names, texts, bad)
        result = Result(kept=records)
        if bad:
            result = set_aside(result, records, bad)
        end = encoder.tokenizer.end_id
        sizes = np.array([len(row) + 1 for row in rows], np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        ids = np.full(int(starts[-1]), end, np.uint32)
        for row, start in zip(rows, starts.tolist(), strict=False):
            ids[start : start + len(row)] = row
        told = write_shard(
            folder,
            number,
            ids=ids,
            starts=starts,
            sources=result.kept["source"].to_pylist(),
            names=result.kept["id"].to_pylist(),
            vocab_size=encoder.tokenizer.vocab_size,
        )
        counts = Counter(
            {
                "documents": told["documents"],
                "tokens": told["tokens"],
                "bytes of text": sum(len(text.encode()) for text in texts),
                f"documents encoded by {engine}": told["documents"],
            }
        )
        return Result(kept=result.kept, quarantined=result.quarantined, counts=counts)


def _encode(
    encoder: Encoder, names: Sequence[str], texts: Sequence[str], bad: dict[str, str]
) -> tuple[list[np.ndarray], str]:
    """Ids of the texts that can be spelled; of the others `bad` gets the reason by name."""
    try:
        return encoder(texts)
    except UserError:
        good = []
        for name, text in zip(names, texts, strict=True):
            try:
                good.append(encoder.tokenizer.encode(text))
            except UserError as error:
                bad[name] = str(error)
        return good, "tokenizers"


@functools.lru_cache(maxsize=2)
def _encoder(tokenizer: str, engine: Engine, checked_documents: int) -> Encoder:
    return Encoder(tokenizer_from_json(tokenizer), engine, checked_documents)
