"""Texts rewritten once, before they are stored: word dropout, back-translation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from lmjax.errors import UserError
from lmjax.prepare.stage import Result, set_aside, with_column


class TextAugmentation(Protocol):
    """A pure function of (text, seed, index), as those of lmjax/data/augment/text.py."""

    def __call__(self, text: str, *, seed: int, index: int) -> str:
        """The text of example `index`, augmented."""
        ...


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Replaces each text by what an augmentation makes of it; its index is a hash of the id.

    So a record is augmented alike wherever it lies and whatever stands beside it. A text of which
    nothing is left, and one that the augmentation refuses (UserError), goes to quarantine.

    Args:
      augmentation: `WordDropout(...)`, `BackTranslation(...)`, or any that takes and gives a text.
      seed: another one draws other augmentations.
    """

    augmentation: TextAugmentation
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be called."""
        if not callable(self.augmentation):
            raise UserError(f"augmentation={self.augmentation!r} is none: give WordDropout(...).")

    def __call__(self, records: pa.Table) -> Result:
        """Augments all records; counts those that changed."""
        texts: list[str] = []
        bad: dict[str, str] = {}
        changed = 0
        for name, text in zip(records["id"].to_pylist(), records["text"].to_pylist(), strict=True):
            data = hashlib.blake2b(name.encode(), digest_size=8).digest()
            index = int.from_bytes(data, "big") >> 1
            try:
                made = self.augmentation(text, seed=self.seed, index=index)
            except UserError as error:
                made, bad[name] = text, str(error)
            if text.strip() and not made.strip():
                bad[name] = "nothing is left of it"
            changed += made != text
            texts.append(made)
        made_of = with_column(records, "text", pa.array(texts, pa.large_string()))
        result = Result(kept=made_of, counts={"texts changed": changed})
        return set_aside(result, records, bad) if bad else result
