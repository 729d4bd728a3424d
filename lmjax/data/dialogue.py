"""Conversations as a data set, of which the assistant's tokens are learned."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from lmjax.core import Spec
from lmjax.data.batches import check_workers
from lmjax.data.cache import cache_folder, is_sealed, write_atomically
from lmjax.data.conversations import MADE, Conversation, read_conversations
from lmjax.data.corpus import Split
from lmjax.data.dialogue_rows import RowPacking, Rows, TooLong, write_rows
from lmjax.data.quarantine import set_aside
from lmjax.data.shuffled import InRows
from lmjax.data.source import find_files
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.vocabulary import Vocabulary
from lmjax.errors import UserError, did_you_mean

log = logging.getLogger("lmjax")
_VERSION = 1

PLAIN = "plain"
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Dialogue(InRows):
    """Next-token prediction of what the assistant says; honours `core.TextDataset`.

    An example is a row of one or more conversations, each as the tokenizer's chat template writes
    it: tokens and targets (int32 [length], targets one token ahead), weights (float32 [length]: 1
    where the target is the assistant's, and for the token that ends its message; 0 elsewhere),
    segments (int32 [length]: 1, 2, ... per conversation, 0 for padding) and positions (int32
    [length], from the start of each). `dialogue_rows.chat_tokens` says what is the assistant's.

    Conversations are put into rows once, by best-fit decreasing, and an epoch is a permutation of
    the rows, drawn from (seed, epoch). The validation split comes in order. What is no
    conversation, what the template refuses, and one without a token of the assistant is set aside,
    and listed below the cache; see `counts`.

    Args:
      path: see `conversations.read_conversations`; "made" needs no file.
      vocabulary: of a tokenizer with a chat template, as `Pretrained(path=...)`.
      template: "" for the tokenizer's own; "plain" for the role, a line break and the message; or
        the path of a Jinja file. It becomes the tokenizer's own, and is saved with the run.
      length: tokens in a row.
      too_long: "cut" for the beginning of a conversation that is longer than a row, "drop" to leave
        it out.
      packing: "fit", or "none" for one conversation to a row.
      split: "train" or "valid".
      valid_fraction: the share that is held out, by the hash of the conversation.
      max_conversations: if not 0, at most so many of the split, the first by their hash.
      workers: processes that read batches; 0 reads in this one. Batches do not depend on it.
    """

    path: str
    vocabulary: Vocabulary
    template: str = ""
    length: int = 512
    too_long: TooLong = "cut"
    packing: RowPacking = "fit"
    split: Split = "train"
    valid_fraction: float = 0.05
    max_conversations: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values and paths that cannot work."""
        for name, given, allowed in (
            ("split", self.split, ("train", "valid")),
            ("packing", self.packing, ("fit", "none")),
            ("too_long", self.too_long, ("cut", "drop")),
        ):
            if given not in allowed:
                raise UserError(f"{name} is {given!r}." + did_you_mean(str(given), allowed))
        if self.length < 1 or self.max_conversations < 0:
            raise UserError(
                f"length is {self.length} and max_conversations {self.max_conversations}: give at "
                "least 1 and 0."
            )
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid_fraction is {self.valid_fraction}: give one in [0, 1).")
        check_workers(self.workers)
        if self.path != MADE:
            find_files(self.path)

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        spec = {
            name: jax.ShapeDtypeStruct((self.length,), np.int32)
            for name in ("tokens", "targets", "segments", "positions")
        }
        return {**spec, "weights": jax.ShapeDtypeStruct((self.length,), np.float32)}

    def check(self) -> None:
        """Reads the conversations; raises UserError where nothing can be learned of them."""
        _ = self._rows

    @property
    def tokenizer(self) -> SubwordTokenizer:
        """The vocabulary's, with the chat template."""
        return _tokenizer(_Kind(vocabulary=self.vocabulary, template=self.template))

    @property
    def fitted(self) -> Mapping[str, str]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer.to_json()}

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return self.vocabulary.vocab_size or self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of."""
        return hashlib.sha256(self._rows.folder.name.encode()).hexdigest()

    @functools.cached_property
    def conversations(self) -> Sequence[Conversation]:
        """Those of this split as they were read, also what is too long or set aside later."""
        found = [
            one
            for one in _read(self.path)
            if (one.share < self.valid_fraction) == (self.split == "valid")
        ]
        if not self.max_conversations or len(found) <= self.max_conversations:
            return found
        first = sorted(range(len(found)), key=lambda i: (found[i].digest[8:], i))
        return [found[i] for i in sorted(first[: self.max_conversations])]

    @property
    def counts(self) -> Mapping[str, int]:
        """What became of the conversations of this split."""
        return self._rows.counts

    @functools.cached_property
    def _rows(self) -> Rows:
        tokenizer, conversations = self.tokenizer, self.conversations
        _ = tokenizer.chat  # without a template nothing can be read
        if not conversations:
            raise UserError(
                f"the {self.split} split of {self.path} holds no conversations: valid_fraction is "
                f"{self.valid_fraction}; choose one that leaves some in both halves."
            )
        made_of = (_VERSION, tokenizer.hash, self.length, self.packing, self.too_long)
        key = hashlib.sha256(repr(made_of).encode())
        for one in conversations:
            key.update(one.digest)
        folder = cache_folder() / "dialogue" / key.hexdigest()
        if not is_sealed(folder):
            write_atomically(
                folder,
                lambda made: write_rows(
                    made,
                    conversations,
                    tokenizer,
                    length=self.length,
                    packing=self.packing,
                    too_long=self.too_long,
                ),
            )
        rows = Rows(folder, self.length)
        shown = "; ".join(f"{name}: {count}" for name, count in rows.counts.items())
        if not rows.num_rows:
            raise UserError(
                f"in no conversation of the {self.split} split of {self.path} there is a token of "
                f"the assistant to learn ({shown}). Give another template, or a greater length."
            )
        log.info("%s, %s: %s", self.path, self.split, shown)
        if any(name.startswith("set aside") for name in rows.counts):
            log.warning("what is set aside of them is listed in %s", folder / "quarantine.jsonl")
        return rows


def validation(of: Dialogue, *, max_conversations: int = 0) -> Dialogue:
    """The validation split of the same conversations, read with the same tokenizer."""
    return replace(of, split="valid", max_conversations=max_conversations)


@functools.lru_cache(maxsize=4)
def _read(path: str) -> Sequence[Conversation]:
    good, bad = read_conversations(path)
    set_aside(path, len(good), bad)
    return good


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a tokenizer is made of; hashable, so that it is made once."""

    vocabulary: Vocabulary
    template: str


@functools.lru_cache(maxsize=4)
def _tokenizer(kind: _Kind) -> SubwordTokenizer:
    vocabulary, template = kind.vocabulary, kind.template
    tokenizer = vocabulary.learn([], [])
    if not isinstance(tokenizer, SubwordTokenizer):
        raise UserError(
            f"conversations need a tokenizer with special tokens, and {vocabulary!r} has none: "
            "give Pretrained(path=...)."
        )
    if not template:
        return tokenizer
    text = PLAIN_TEMPLATE if template == PLAIN else _read_template(template)
    named = dict(tokenizer.special_tokens)
    named.setdefault("eos_token", _end_of(tokenizer))
    return replace(
        tokenizer,
        chat_templates=(("default", text),),
        special_tokens=tuple(sorted(named.items())),
    )


def _read_template(path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        near = [f.as_posix() for f in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no chat template at {path!r}." + did_you_mean(path, [PLAIN, *near]))
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the chat template {path!r} cannot be read: {error}.") from error


def _end_of(tokenizer: SubwordTokenizer) -> str:
    """The token that ends a document, as it stands in the tokenizer's file."""
    tree = json.loads(tokenizer.tokenizer_json)
    for token in tree.get("added_tokens", ()):
        if token["id"] == tokenizer.end_id:
            return str(token["content"])
    raise UserError(
        "the tokenizer's file names no special token for the end of a document, which is to end "
        "each message: give Pretrained(path=...) of one that does."
    )
