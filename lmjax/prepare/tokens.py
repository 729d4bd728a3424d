"""The last stage: records to token stores, one for each split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from lmjax.data.folder import Folder
from lmjax.data.store import MANIFEST, PARTS
from lmjax.prepare.backends import Backend
from lmjax.prepare.identity import digest
from lmjax.prepare.shelf import Outcome, Shard, Shelf, read_json, write_json
from lmjax.prepare.split import SPLITS
from lmjax.prepare.stage import Result
from lmjax.prepare.tasks import Done, Timer

if TYPE_CHECKING:
    from lmjax.data.tokenizer import TextTokenizer

STAGE = "tokens"
SUFFIXES = (*PARTS, "json")
TOKENIZER, _LEARNT = "tokenizer.json", "tokenizer-key.json"


class Tokeniser(Protocol):
    """What makes tokens of records: lmjax.prepare.tokenise.Tokenise."""

    @property
    def learns(self) -> bool:
        """Whether the tokenizer depends on the records, and is not published."""

    def learn(self, files: Iterable[pa.Table]) -> TextTokenizer:
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
        """Learns it, if that was not done; one that is published is read anew."""
        done = Done()
        folder = self.shelf.folder
        inputs = [shard.sha256 for shard in self.shards] if self.tokeniser.learns else []
        key = digest([self.shelf.key, inputs])
        held = read_json(folder, _LEARNT, key)
        if held is not None and self.tokeniser.learns and folder.size(TOKENIZER) == held["bytes"]:
            return done
        with Timer(clock := Done(), STAGE):
            data = self.tokeniser.learn(self._tables()).to_json().encode()
        told = {"key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if held != told or folder.size(TOKENIZER) != len(data):
            done = clock
            folder.write(TOKENIZER, data)
            write_json(folder, _LEARNT, told)
        return done

    def _tables(self) -> Iterator[pa.Table]:
        if self.tokeniser.learns:
            yield from (_of_split(shard.load(), "train") for shard in self.shards)


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
        tokenizer = self.shelf.folder.read(TOKENIZER).decode()
        results, parts = [], []
        for split in SPLITS:
            folder = self.shelf.folder / split
            folder.remove(folder.names(f"{number:05d}.*"))
            if len(rows := _of_split(records, split)):
                results.append(
                    self.tokeniser.write(
                        rows, tokenizer=tokenizer, folder=folder.path, number=number
                    )
                )
                told = json.loads(folder.read(f"{number:05d}.json"))
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
    text = shelf.folder.read(TOKENIZER).decode()
    sha256 = digest(text)
    done = engine.map(
        [
            Encode(tokeniser=tokeniser, shard=shard, shelf=shelf, tokenizer_sha256=sha256)
            for shard in shards
        ]
    )
    shelf.tidy([each.outcomes[STAGE] for each in done])
    stores = {}
    for split in SPLITS:
        folder = shelf.folder / split
        names = folder.names("[0-9]*.*")
        spare = [name for name in names if int(name.partition(".")[0]) >= len(shards)]
        folder.remove(spare)  # of shards that there are no more
        if any(name.endswith(".json") for name in set(names) - set(spare)):
            tokenizer = tokenizer_from_json(text)
            stores[split] = dict(seal_store(folder.path, tokenizer=tokenizer, more=more))
    return stores


def publish(shelf: Shelf, stores: Mapping[str, Mapping[str, Any]], to: Folder) -> None:
    """Shows the stores in the folder `to`, by links or copies inside an object store.

    A store's manifest is the last file to come and the first to go, so that a store is there whole
    or not at all. One that is there already stays, with what others wrote beside it.
    """
    for split in SPLITS:
        made, shown = shelf.folder / split, to / split
        if split in stores and _same(made, shown):
            continue
        shown.remove([MANIFEST])
        shown.remove_all()
        if split in stores:
            names = [f"{t['name']}.{part}" for t in stores[split]["shards"] for part in SUFFIXES]
            for name in [*names, TOKENIZER, MANIFEST]:
                made.copy(name, shown)


def _same(made: Folder, shown: Folder) -> bool:
    """Whether what is shown is what was made: its manifest, and the sizes of all files."""
    try:
        if made.read(MANIFEST) != shown.read(MANIFEST):
            return False
    except FileNotFoundError:
        return False
    own, there = made.files(), shown.files()
    return all(there.get(name) == size for name, size in own.items())


def _of_split(records: pa.Table, split: str) -> pa.Table:
    if "split" not in records.column_names:
        return records if split == "train" else records.slice(0, 0)
    return records.filter(pc.equal(records["split"], split))
