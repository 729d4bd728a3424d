"""Training and validation: drawn by document group, so that near-duplicates never part."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from lmjax.errors import UserError
from lmjax.prepare.stage import Result, with_column

SPLITS = ("train", "valid")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Adds the column `split`: "valid" for a share of the groups, "train" for the others.

    A record's group is its column `group`, which the search for near-duplicates writes, or else its
    id. Which half it falls in is a hash of that alone: other records, more files or another order
    move none.

    Args:
      valid: the share of groups that validates; of documents it is about the same.
      seed: another one draws other groups.
    """

    valid: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.valid < 1:
            raise UserError(f"valid is {self.valid}: give the share that validates, in [0, 1).")

    def __call__(self, records: pa.Table) -> Result:
        """Keeps every record."""
        names = records["group" if "group" in records.column_names else "id"].to_pylist()
        limit = int(self.valid * 2**64)
        split = [SPLITS[self._hash(name) < limit] for name in names]
        counts = {f"records for {name}": n for name, n in Counter(split).items()}
        return Result(
            kept=with_column(records, "split", pa.array(split, pa.string())), counts=counts
        )

    def _hash(self, name: str) -> int:
        data = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        return int.from_bytes(data, "big")
