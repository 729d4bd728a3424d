"""The last stage: records to token stores, one for each split."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from lmjax.prepare.backends import Backend
from lmjax.prepare.identity import digest
from lmjax.prepare.shelf import Outcome, Shard, Shelf, read_json, write_atomically, write_json
from lmjax.prepare.split import SPLITS
from lmjax.prepare.stage import Result
from lmjax.prepare.tasks import Done, Timer

if TYPE_CHECKING:
    from lmjax.data.tokenizer import TextTokenizer

STAGE = "tokens"


class Tokeniser(Protocol):
    """What makes tokens of records: lmjax.prepare.tokenise.Tokenise."""

    def learn(self, files: Iterator[pa.Table]) -> TextTokenizer:
        """The tokenizer for these records."""

    def write(
        self, records: pa.Table, *, tokenizer: TextTokenizer | str, folder: str, number: int
    ) -> Result:
        """Writes shard `number` of the store in `folder`."""


@dataclass(frozen=True, kw_only=True)
class Learn:
    """Learns the tokenizer from the records that train."""

    tokeniser: Tokeniser
    shards: Sequence[Shard]
    shelf: Shelf

    def run(self) -> Done:
        """Learns it, if that was not done."""
        done = Done()
        key = digest([self.shelf.key, [shard.sha256 for shard in self.shards]])
        told = Path(self.shelf.folder, "tokenizer-key.json")
        if read_json(told, key) is None:
            with Timer(done, STAGE):
                tables = (_of_split(shard.load(), "train") for shard in self.shards)
                text = self.tokeniser.learn(tables).to_json()
                write_atomically(tokenizer_file(self.shelf), lambda made: made.write_text(text))
                write_json(told, {"key": key})
        return done


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Writes the tokens of a shard of records: a shard of each split's store."""

    tokeniser: Tokeniser
    shard: Shard
    shelf: Shelf
    tokenizer_sha256: str

    def run(self) -> Done:
        """Writes them, if that was not done."""
        done = Done()
        key = digest([self.shelf.key, self.shard.sha256, self.tokenizer_sha256])
        outcome = self.shelf.outcome(self.shard.number, key)
        if outcome is None:
            with Timer(done, STAGE):
                outcome = self._write(key)
        done.outcomes[STAGE] = outcome
        return done

    def _write(self, key: str) -> Outcome:
        records, number = self.shard.load(), self.shard.number
        tokenizer = tokenizer_file(self.shelf).read_text()
        results, parts = [], []
        for split in SPLITS:
            folder = Path(self.shelf.folder, split)
            for old in folder.glob(f"{number:05d}.*"):
                old.unlink()
            if len(rows := _of_split(records, split)):
                results.append(
                    self.tokeniser.write(
                        rows, tokenizer=tokenizer, folder=str(folder), number=number
                    )
                )
                told = json.loads((folder / f"{number:05d}.json").read_bytes())
                for suffix, file in told["files"].items():
                    parts.append({"name": f"{split}/{number:05d}.{suffix}", **file})
        return self.shelf.put(number, key, results, rows=len(records), parts=parts)


def make_stores(
    tokeniser: Tokeniser,
    shards: Sequence[Shard],
    shelf: Shelf,
    engine: Backend,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Learns, encodes and seals; returns the manifest of each split's store.

    `more` are fields for the manifests. A split without a token gets no store.
    """
    from lmjax.data.store import seal_store
    from lmjax.data.tokenizer import tokenizer_from_json

    engine.map([Learn(tokeniser=tokeniser, shards=shards, shelf=shelf)])
    text = tokenizer_file(shelf).read_text()
    sha256 = digest(text)
    engine.map(
        [
            Encode(tokeniser=tokeniser, shard=shard, shelf=shelf, tokenizer_sha256=sha256)
            for shard in shards
        ]
    )
    shelf.tidy(len(shards))
    stores = {}
    for split in SPLITS:
        folder = Path(shelf.folder, split)
        for file in folder.glob("[0-9]*.*"):  # of shards that there are no more
            if int(file.name[:5]) >= len(shards):
                file.unlink()
        if any(folder.glob("[0-9]*.json")):
            tokenizer = tokenizer_from_json(text)
            stores[split] = dict(seal_store(folder, tokenizer=tokenizer, more=more))
    return stores


def publish(shelf: Shelf, splits: Sequence[str], to: Path) -> None:
    """Shows the stores in the folder `to`, without copying where the disk can link."""
    made = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    for split in splits:
        shutil.copytree(Path(shelf.folder, split), made / split, copy_function=_link)
    shutil.rmtree(to, ignore_errors=True)
    if made.exists():
        made.rename(to)


def tokenizer_file(shelf: Shelf) -> Path:
    """Where the tokenizer lies."""
    return Path(shelf.folder, "tokenizer.json")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _of_split(records: pa.Table, split: str) -> pa.Table:
    if "split" not in records.column_names:
        return records if split == "train" else records.slice(0, 0)
    return records.filter(pc.equal(records["split"], split))
