"""A token store: documents as token ids in flat shards, read by random access.

docs/data.md describes the format. A folder holds `store.json` (the manifest), `tokenizer.json`, and
for each shard NNNNN.bin (ids of all documents, one after another, little-endian), .idx (int64
[documents + 1], where each begins), .src (uint16 [documents], its source among those of the shard),
.ids (its id, a JSON string a line) and .json (counts, and size and sha256 of the others). Each file
appears whole (lmjax/data/folder.py), the .json last, so that a shard is there or not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data.folder import Folder
from lmjax.data.remote import Opened, is_remote, join, read_remote
from lmjax.data.tokenizer import TextTokenizer, tokenizer_from_json
from lmjax.errors import UserError, did_you_mean

FORMAT = "lmjax tokens 1"
MANIFEST, TOKENIZER = "store.json", "tokenizer.json"
PREPARATION = "manifest.json"  # of all that `python -m lmjax.prepare` made
PARTS = ("bin", "idx", "src", "ids")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of stored ids: two bytes where they hold the vocabulary, else four."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(
    folder: str | Path,
    number: int,
    *,
    ids: np.ndarray,
    starts: np.ndarray,
    sources: Sequence[str],
    names: Sequence[str],
    vocab_size: int,
) -> Mapping[str, Any]:
    """Writes one shard; returns what its .json says. The bytes depend on the arguments alone.

    Args:
      folder: the store's, a path or an address; made where it is not there.
      number: the shard's, which orders documents in the store.
      ids: [tokens], any integers below `vocab_size`; documents one after another, ends included.
      starts: [documents + 1], where each document begins; the last is the number of tokens.
      sources: [documents], which source each is of; at most 65,536 different ones.
      names: [documents], the ids of the documents.
    """
    at, name = Folder(str(folder)), f"{number:05d}"
    starts = np.asarray(starts, "<i8")
    assert len(starts) == len(sources) + 1 == len(names) + 1 and starts[-1] == len(ids)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise UserError(
            f"shard {name} holds the id {int(ids.max())}, and the vocabulary has {vocab_size}. "
            "Give the vocabulary that made the ids."
        )
    known = list(dict.fromkeys(sources))
    index = {source: i for i, source in enumerate(known)}
    contents: dict[str, Any] = {
        "bin": np.ascontiguousarray(ids, token_dtype(vocab_size)).view(np.uint8),
        "idx": starts.view(np.uint8),
        "src": np.array([index[source] for source in sources], "<u2").view(np.uint8),
        "ids": "".join(json.dumps(text) + "\n" for text in names).encode(),
    }
    sums = {}
    for part in PARTS:
        data = contents[part]
        sums[part] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write(at, f"{name}.{part}", data)
    documents = Counter(sources)
    tokens: Counter[str] = Counter()
    for source, size in zip(sources, np.diff(starts).tolist(), strict=True):
        tokens[source] += size
    told = {
        "name": name,
        "documents": len(names),
        "tokens": len(ids),
        "sources": {s: {"documents": documents[s], "tokens": tokens[s]} for s in known},
        "files": sums,
    }
    _write(at, f"{name}.json", json.dumps(told, indent=1).encode())
    return told


def seal_store(
    folder: str | Path, *, tokenizer: TextTokenizer, more: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Makes a store of the shards in a folder: writes its tokenizer and manifest, and returns it.

    To be called when nobody writes any shard of it. `more` are further fields of the manifest:
    config, licences, counts of earlier stages.
    """
    at = Folder(str(folder))
    at.remove(at.names("*.tmp"))  # of writers that were killed
    names = sorted(at.names("[0-9]*.json"), key=lambda name: int(name.partition(".")[0]))
    shards = [json.loads(at.read(name)) for name in names]
    if not sum(shard["tokens"] for shard in shards):
        raise UserError(f"{at.path} holds no tokens: write at least one shard of documents first.")
    sources: dict[str, dict[str, int]] = {}
    for shard in shards:
        for name, counts in shard["sources"].items():
            held = sources.setdefault(name, {"documents": 0, "tokens": 0})
            for key in held:
                held[key] += counts[key]
    text = tokenizer.to_json()
    manifest = {
        "format": FORMAT,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sources": sources,
        "shards": shards,
        **(more or {}),
    }
    manifest["sha256"] = own_sha256(manifest)
    _write(at, TOKENIZER, text.encode())
    _write(at, MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def own_sha256(manifest: Mapping[str, Any]) -> str:
    """The sha256 of all of a manifest but this sum itself, which its field `sha256` tells."""
    told = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def verify_preparation(path: str, stores: Sequence[str]) -> Iterator[str]:
    """Yields what is wrong with the manifest of a preparation, if `path` is one, and its stores."""
    where, told = join(path, PREPARATION), None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        told = Folder(str(Path(path).expanduser()) if not is_remote(path) else path).read(
            PREPARATION
        )
    if told is None:
        return
    try:
        held = json.loads(told)
        assert held["sha256"] == own_sha256(held), "its sha256 is not its own"
        for folder in stores:
            split = folder.rstrip("/").rpartition("/")[2]
            own = Store(folder).manifest.get("sha256")
            if held["tokens"].get(split, {}).get("sha256") != own:
                yield (
                    f"{join(folder, MANIFEST)} is not of the preparation that {where} tells of: "
                    "run it again."
                )
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        yield f"{where} is damaged ({error}): run the preparation again."


def find_store(path: str, split: str = "") -> str:
    """The folder of a store: the split below `path` or below its folder `tokens`, or `path` itself.

    A path that is itself a store is never the split "valid": it may be what a run trains on.
    Raises UserError where there is none. An object store is asked for the manifest alone.
    """
    tried = [f"tokens/{split}", split] if split else []
    if split != "valid":
        tried.append("")
    for inside in tried:
        folder = join(path, inside) if inside else path.rstrip("/")
        if is_remote(path):
            if read_remote(join(folder, MANIFEST), missing=True) is not None:
                return folder
        elif Path(folder).expanduser().joinpath(MANIFEST).is_file():
            return str(Path(folder).expanduser())
    near = []
    if not is_remote(path) and (given := Path(path).expanduser()).parent.is_dir():
        near = [str(file.parent) for file in given.parent.glob(f"*/{MANIFEST}")]
        near += (
            [str(file.parent) for file in given.glob(f"**/{MANIFEST}")] if given.is_dir() else []
        )
    of = f" of the split {split!r}" if split else ""
    raise UserError(f"no token store{of} at {path!r}." + did_you_mean(path, near))


@dataclass(frozen=True)
class Store:
    """A store that is open: any run of tokens by its place among all tokens.

    Shards lie one after another in the order of their names, which gives each token and document
    of the store a number. Pickles as its path.

    Args:
      path: the folder that holds store.json; local, or an address of an object store (s3://...).
      cache_bytes: how much of an object store is kept on the local disk, by all processes together.
    """

    path: str
    cache_bytes: int = 2**40

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopened, not copied, in another process."""
        return Store, (self.path, self.cache_bytes)

    @functools.cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What store.json says; raises UserError where it is damaged."""
        where = join(self.path, MANIFEST)
        data = self._opened.read(MANIFEST)
        try:
            held = json.loads(data)
            assert held["format"] == FORMAT, f"its format is {held['format']!r}, not {FORMAT!r}"
            own = held.get("sha256") or own_sha256(held)
            assert own == own_sha256(held), "its sha256 is not its own"
            sizes = {part: 0 for part in PARTS}
            width = np.dtype(held["dtype"]).itemsize
            for shard in held["shards"]:
                sizes = {part: int(shard["files"][part]["bytes"]) for part in PARTS}
                expected = (shard["tokens"] * width, 8 * (shard["documents"] + 1))
                assert (sizes["bin"], sizes["idx"]) == expected, f"shard {shard['name']}"
            assert held["shards"], "it names no shards"
            return dict(held)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{where} is no manifest of a token store ({error}): prepare the store again."
            ) from error

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """What made the tokens."""
        data = self._opened.read(TOKENIZER)
        if hashlib.sha256(data).hexdigest() != self.manifest["tokenizer_sha256"]:
            raise UserError(
                f"{join(self.path, TOKENIZER)} is not the one that made the tokens: its sha256 is "
                "not that of the manifest. Copy the store again, or prepare it again."
            )
        return tokenizer_from_json(data.decode())

    @property
    def num_tokens(self) -> int:
        """How many tokens the store holds."""
        return int(self.manifest["tokens"])

    @property
    def num_documents(self) -> int:
        """How many documents the store holds."""
        return int(self.manifest["documents"])

    @functools.cached_property
    def sources(self) -> tuple[str, ...]:
        """The names of its sources, in the order of their first documents."""
        return tuple(self.manifest["sources"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names what the store holds: sha256 of the hashes of its tokenizer and of all shards."""
        held = [self.manifest["tokenizer_sha256"], self.manifest["dtype"]]
        for shard in self.manifest["shards"]:
            held += [shard["files"][part]["sha256"] for part in PARTS]
            held += list(shard["sources"])
        return hashlib.sha256(repr(held).encode()).hexdigest()

    @functools.cached_property
    def first_tokens(self) -> np.ndarray:
        """The number of each shard's first token, and of all tokens; int64 [shards + 1]."""
        return np.cumsum([0] + [shard["tokens"] for shard in self.manifest["shards"]])

    @functools.cached_property
    def first_documents(self) -> np.ndarray:
        """Likewise of documents."""
        return np.cumsum([0] + [shard["documents"] for shard in self.manifest["shards"]])

    def tokens(self, shard: int) -> np.ndarray:
        """The ids of a shard, unsigned [tokens]: a map of its file."""
        return self._array(shard, "bin", np.dtype(self.manifest["dtype"]).newbyteorder("<").str)

    def starts(self, shard: int) -> np.ndarray:
        """Where the documents of a shard begin in it, int64 [documents + 1]."""
        return self._array(shard, "idx", "<i8")

    def source_of(self, shard: int) -> np.ndarray:
        """The source of each document of a shard: an index into `sources`; int64 [documents]."""
        own = [self.sources.index(name) for name in self.manifest["shards"][shard]["sources"]]
        return np.array(own, np.int64)[self._array(shard, "src", "<u2")]

    def names(self, shard: int) -> Sequence[str]:
        """The ids of a shard's documents."""
        return _names(str(self._opened.file(self._part(shard, "ids"))))

    def read(self, first: int, end: int) -> np.ndarray:
        """The tokens first..end, which lie in one shard, as unsigned integers."""
        shard = int(np.searchsorted(self.first_tokens, first, side="right")) - 1
        begin = int(self.first_tokens[shard])
        assert end <= self.first_tokens[shard + 1], "tokens of two shards"
        return self.tokens(shard)[first - begin : end - begin]

    def document(self, number: int) -> tuple[str, str, int, int]:
        """(id, source, first token, one past the last) of a document, by its number."""
        shard = int(np.searchsorted(self.first_documents, number, side="right")) - 1
        inside, begin = number - int(self.first_documents[shard]), int(self.first_tokens[shard])
        first, end = self.starts(shard)[inside : inside + 2].tolist()
        source = self.sources[int(self.source_of(shard)[inside])]
        return self.names(shard)[inside], source, begin + first, begin + end

    def document_at(self, token: int) -> int:
        """The number of the document that holds a token."""
        shard = int(np.searchsorted(self.first_tokens, token, side="right")) - 1
        inside = token - int(self.first_tokens[shard])
        found = int(np.searchsorted(self.starts(shard), inside, side="right")) - 1
        return int(self.first_documents[shard]) + found

    def verify(self) -> Iterator[str]:
        """Reads every file, and yields what is wrong with each that is damaged."""
        try:
            _ = self.tokenizer
        except UserError as error:
            yield str(error)
        for shard in self.manifest["shards"]:
            for part in PARTS:
                try:
                    self._opened.verify(f"{shard['name']}.{part}", shard["files"][part])
                except UserError as error:
                    yield str(error)

    @functools.cached_property
    def _opened(self) -> Opened:
        return Opened(self.path, self.cache_bytes)

    def _part(self, shard: int, part: str) -> tuple[str, int, str]:
        told = self.manifest["shards"][shard]
        held = told["files"][part]
        return f"{told['name']}.{part}", int(held["bytes"]), str(held["sha256"])

    def _array(self, shard: int, part: str, dtype: str) -> np.ndarray:
        return self._opened.array(self._part(shard, part), dtype)


@functools.lru_cache(maxsize=4)
def _names(file: str) -> Sequence[str]:
    lines = Path(file).read_text("utf-8").splitlines()
    return [str(json.loads(line)) for line in lines]


def _write(folder: Folder, name: str, data: Any) -> None:
    try:
        folder.write(name, data)
    except OSError as error:
        where = folder.at(name)
        raise UserError(f"{where} cannot be written: {error.strerror or error}.") from error
