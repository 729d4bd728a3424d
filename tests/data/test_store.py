"""Token stores: what is written is read, damage is named, and an object store is cached."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmjax.data import remote
from lmjax.data.cache import cache_folder
from lmjax.data.packed import Tokens
from lmjax.data.store import (
    Store,
    find_store,
    own_sha256,
    seal_store,
    token_dtype,
    verify_preparation,
    write_shard,
)
from lmjax.data.survey import find_stores, spell_survey, survey
from lmjax.data.tokenizer import ByteTokenizer
from lmjax.errors import UserError
from tests.data.stores import random_documents, write_store

ROOT = Path(__file__).parents[2]
DOCUMENTS = random_documents([5, 40, 1, 90, 33, 2, 17])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_store(tmp_path / "tokens" / "train", DOCUMENTS, sources=("a", "b"), num_shards=3)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The same store in an object store, which is the memory of this process."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/bucket/tokens/train/{file.name}", file.read_bytes())
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def test_what_is_written_is_read(folder: Path) -> None:
    store = Store(str(folder))
    assert (store.num_documents, store.num_tokens) == (7, sum(map(len, DOCUMENTS)))
    assert store.sources == ("a", "b") and store.tokenizer == ByteTokenizer()
    for number, expected in enumerate(DOCUMENTS):
        name, source, first, end = store.document(number)
        assert (name, source) == (f"doc{number}", "ab"[number % 2])
        np.testing.assert_array_equal(store.read(first, end), expected)
        assert {store.document_at(token) for token in (first, end - 1)} == {number}
        if end - first > 3:
            np.testing.assert_array_equal(store.read(first + 1, end - 2), expected[1:-2])
    assert store.tokens(0).dtype == np.uint16 and list(store.verify()) == []
    again = pickle.loads(pickle.dumps(store))
    assert again == store and "_opened" not in vars(again)
    assert [token_dtype(n) for n in (65536, 65537)] == [np.uint16, np.uint32]


def test_the_format_is_the_one_that_is_documented(folder: Path) -> None:
    """Read with numpy alone, as docs/data.md says."""
    told = json.loads((folder / "store.json").read_text())
    found = []
    for shard in told["shards"]:
        ids = np.fromfile(folder / f"{shard['name']}.bin", told["dtype"])
        starts = np.fromfile(folder / f"{shard['name']}.idx", "<i8")
        sources = np.fromfile(folder / f"{shard['name']}.src", "<u2")
        names = [json.loads(line) for line in (folder / f"{shard['name']}.ids").open()]
        assert len(starts) == shard["documents"] + 1 == len(names) + 1
        for i, name in enumerate(names):
            found.append((name, list(shard["sources"])[sources[i]]))
            np.testing.assert_array_equal(ids[starts[i] : starts[i + 1]], DOCUMENTS[len(found) - 1])
        for part, sealed in shard["files"].items():
            data = (folder / f"{shard['name']}.{part}").read_bytes()
            assert sealed == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert found == [(f"doc{i}", "ab"[i % 2]) for i in range(7)]
    assert not list(folder.glob("*.tmp"))


def test_shards_in_any_order_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    def write(number: int) -> None:
        ids = np.array([number, 256])
        told = {"starts": np.array([0, 2]), "sources": ["s"], "names": ["n"], "vocab_size": 257}
        write_shard(tmp_path / f"{order}", number, ids=ids, **told)

    held = []
    for order in (range(4), (3, 0, 2, 1, 0)):
        for number in order:
            write(number)
        (tmp_path / f"{order}" / "00003.bin.1234.tmp").write_bytes(b"killed")
        seal_store(tmp_path / f"{order}", tokenizer=ByteTokenizer(), more={"licence": "CC0"})
        files = sorted((tmp_path / f"{order}").iterdir())
        held.append([(file.name, file.read_bytes()) for file in files])
    assert held[0] == held[1]
    assert Store(str(tmp_path / f"{range(4)}")).manifest["licence"] == "CC0"


def test_empty_shards(tmp_path: Path) -> None:
    empty = {"starts": np.zeros(1), "sources": [], "names": [], "vocab_size": 257}
    write_shard(tmp_path / "s", 0, ids=np.zeros(0, int), **empty)
    with pytest.raises(UserError, match="holds no tokens"):
        seal_store(tmp_path / "s", tokenizer=ByteTokenizer())
    one = {"starts": np.array([0, 2]), "sources": ["s"], "names": ["n"], "vocab_size": 257}
    write_shard(tmp_path / "s", 1, ids=np.array([7, 256]), **one)
    write_shard(tmp_path / "s", 2, ids=np.zeros(0, int), **empty)
    seal_store(tmp_path / "s", tokenizer=ByteTokenizer())
    store = Store(str(tmp_path / "s"))
    assert store.document(0) == ("n", "s", 0, 2) and list(store.verify()) == []
    batch = Tokens(path=str(tmp_path / "s"), length=4)._examples(0).rows(range(2))
    assert batch["tokens"].tolist() == [[7, 256, 0, 0]] * 2
    with pytest.raises(UserError, match="holds the id 300"):
        write_shard(tmp_path / "s", 1, ids=np.array([7, 300]), **one)


def test_stores_are_found(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "tokens", folder):
        assert find_store(str(path), "train") == str(folder)
        assert find_stores(str(path)) == [str(folder)]
    with pytest.raises(
        UserError, match=r"no token store of the split 'valid' at .*Allowed: .*train"
    ):
        find_store(str(tmp_path), "valid")
    with pytest.raises(UserError, match="of the split 'valid'"):  # not what a run trains on
        find_store(str(folder), "valid")


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "00001.bin").read_bytes()
    (folder / "00001.bin").write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"00001\.bin has \d+ bytes, and the manifest tells of \d+"):
        Tokens(path=str(tmp_path), length=8)._examples(0).rows(range(40))
    (folder / "00001.bin").write_bytes(b"\1" + whole[1:])
    (damage,) = Store(str(folder)).verify()
    assert "00001.bin is damaged: its sha256 is" in damage
    assert "damaged: " in "".join(spell_survey(survey(Store(str(folder)))))
    (folder / "00001.idx").unlink()
    assert len(list(Store(str(folder)).verify())) == 2
    with pytest.raises(UserError, match=r"00001\.idx is not there"):
        Store(str(folder)).document(3)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the one that made the tokens"):
        _ = Store(str(folder)).tokenizer
    for text in ("", "{}", '{"format": "other"}', (folder / "store.json").read_text()[:-9]):
        (folder / "store.json").write_text(text)
        with pytest.raises(UserError, match=r"store\.json is no manifest of a token store"):
            _ = Store(str(folder)).manifest


def test_an_object_store_is_cached(bucket: str, folder: Path, room: Path) -> None:
    local, there = (Tokens(path=path, length=8) for path in (str(folder), bucket))
    assert there.store.path == f"{bucket}/tokens/train"
    for name, value in local._examples(2).rows(range(30)).items():
        np.testing.assert_array_equal(value, there._examples(2).rows(range(30))[name])
    assert there.fingerprint == local.fingerprint and list(there.store.verify()) == []
    cached = {file.name for file in room.iterdir() if not file.suffix}
    assert cached == {
        part["sha256"] for s in local.store.manifest["shards"] for part in s["files"].values()
    }
    # Damaged where it is cached: copied again. Of another size: likewise, when it is opened.
    for data in (b"\0" * 12, b"short"):
        for name in cached:
            (room / name).write_bytes(data)
        assert list(Store(there.store.path).verify()) == []
    np.testing.assert_array_equal(Store(there.store.path).read(0, 5), DOCUMENTS[0])


def test_what_was_used_longest_ago_goes_first(bucket: str, room: Path) -> None:
    store = Store(f"{bucket}/tokens/train")
    sizes = [shard["files"]["bin"]["bytes"] for shard in store.manifest["shards"]]
    small = Store(store.path, cache_bytes=sum(sizes) - 1)
    for number in (0, 1, 0):
        small.tokens(number)
        small._opened._maps.clear()
        os.utime(room / store.manifest["shards"][number]["files"]["bin"]["sha256"])
    small.tokens(2)
    there = [
        (room / shard["files"]["bin"]["sha256"]).exists() for shard in store.manifest["shards"]
    ]
    assert there == [True, False, True]
    assert small.tokens(1).size == sizes[1] // 2  # again
    held = sum(file.stat().st_size for file in room.iterdir() if not file.suffix)
    assert held <= small.cache_bytes
    assert sum(array.nbytes for array in small._opened._maps.values()) <= small.cache_bytes
    for file in room.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="cache_bytes is 3: raise it"):
        Store(store.path, cache_bytes=3).tokens(1)


def test_one_of_many_copies_a_shard(
    bucket: str, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = remote._open

    def count(url: str) -> object:
        opened.append(url)
        return real(url)

    store = Store(f"{bucket}/tokens/train")
    assert store.manifest
    monkeypatch.setattr(remote, "_open", count)
    threads = [
        threading.Thread(target=Store(store.path).__class__._array, args=(other, 0, "bin", "<u2"))
        for other in (Store(store.path) for _ in range(4))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(url.endswith("00000.bin") for url in opened) == 1


def test_an_object_store_that_lies_or_fails(
    bucket: str, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr("time.sleep", lambda _: None)
    path, memory = f"{bucket}/tokens/train", fsspec.filesystem("memory")
    real, failures = remote._open, iter([OSError("reset"), OSError("reset")])

    def fail_twice(url: str) -> object:
        if url.endswith(".bin"):
            for error in failures:
                raise error
        return real(url)

    monkeypatch.setattr(remote, "_open", fail_twice)
    np.testing.assert_array_equal(Store(path).read(0, 5), DOCUMENTS[0])
    memory.pipe_file("/bucket/tokens/train/00001.bin", b"other bytes")
    with pytest.raises(UserError, match=r"00001\.bin is damaged: it has 11 bytes"):
        Store(path).tokens(1)
    memory.rm_file("/bucket/tokens/train/00001.bin")
    with pytest.raises(UserError, match=r"00001\.bin is not there"):
        Store(path).tokens(1)
    with pytest.raises(UserError, match="no token store"):
        find_store("memory://nowhere", "train")
    with pytest.raises(UserError, match="that fsspec knows"):
        find_store("nosuch://bucket")
    assert not list(room.glob("*.tmp"))


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmjax.data", *arguments],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "nonexistent", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_survey_counts(folder: Path) -> None:
    found = survey(Store(str(folder)), samples=2)
    assert json.loads(json.dumps(found)) == found
    for source, own in (("a", DOCUMENTS[::2]), ("b", DOCUMENTS[1::2])):
        sizes = [len(document) for document in own]
        told = found["sources"][source]
        assert (told["documents"], told["tokens"]) == (len(own), sum(sizes))
        assert told["min/median/95 %/max"][::3] == [min(sizes), max(sizes)]
        assert sum(found["lengths"]["documents"][source]) == len(own)
        for low, high, count in zip(
            found["lengths"]["least"],
            [*found["lengths"]["least"][1:], 10**9],
            found["lengths"]["documents"][source],
            strict=True,
        ):
            assert count == sum(low <= size < high for size in sizes)
    assert [sample["document"] for sample in found["samples"]] == [0, 6]
    decode = ByteTokenizer().decode
    assert found["samples"][1]["text"] == decode(DOCUMENTS[6])
    text = "\n".join(spell_survey(found))
    assert "7 documents, 188 tokens" in text and "12 files of" in text


@pytest.mark.slow
def test_the_command_tells_of_a_store(folder: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "tokens" / "valid", DOCUMENTS[:2])
    done = command(f"--path={tmp_path}", "--rows=1")
    assert done.returncode == 0, done.stderr
    assert "7 documents" in done.stdout and "2 documents" in done.stdout
    for split in ("train", "valid"):
        picture = tmp_path / "tokens" / split / "document_lengths.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in done.stdout
    told = [
        json.loads(line) for line in command(f"--path={tmp_path}", "--json").stdout.split("\n")[:2]
    ]
    assert [row["documents"] for row in told] == [7, 2]
    (folder / "00002.bin").write_bytes((folder / "00002.bin").read_bytes()[::-1])
    done = command(f"--path={tmp_path}")
    assert done.returncode == 2 and "00002.bin is damaged" in done.stderr
    done = command("--path=/nowhere")
    assert done.returncode == 2 and "no token store" in done.stderr
    done = command(f"--path={tmp_path}", "--step=1")
    assert done.returncode == 2 and "--path shows a token store" in done.stderr


@pytest.mark.slow
def test_s3(folder: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto, which speaks S3 on loopback."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3 = fsspec.filesystem("s3", endpoint_url=f"http://{host}:{port}")
        s3.mkdir("corpus")
        s3.put(str(folder) + "/", "corpus/tokens/train/", recursive=True)
        there, local = Tokens(path="s3://corpus", length=8), Tokens(path=str(folder), length=8)
        for name, value in local._examples(2).rows(range(30)).items():
            np.testing.assert_array_equal(value, there._examples(2).rows(range(30))[name])
        assert list(there.store.verify()) == []
        with contextlib.closing(there.batches(batch_size=4, seed=1)) as batches:
            assert next(batches)["tokens"].shape == (4, 8)
        assert cache_folder() in room.parents
    finally:
        server.stop()


def test_a_tokenizer_elsewhere_is_read_and_what_changes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))
    for name, text in [("tokenizer.json", "a"), ("tokenizer_config.json", "b"), ("x.bin", "c")]:
        memory.pipe_file(f"/published/{name}", text.encode())
    suffixes = (".json", ".model")
    folder = Path(remote.localised("memory://published", suffixes))
    assert sorted(file.name for file in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    file = Path(remote.localised("memory://published/tokenizer.json", suffixes))
    assert file.read_text() == "a" and (file.parent / "tokenizer_config.json").is_file()
    memory.pipe_file("/published/tokenizer_config.json", b"d")
    again = Path(remote.localised("memory://published/tokenizer.json", suffixes))
    assert again != file and again.with_name("tokenizer_config.json").read_text() == "d"
    assert Path(remote.localised("memory://published/x.bin", ())).read_text() == "c"
    assert remote.localised("/a/b", ()) == "/a/b"
    with pytest.raises(UserError, match="there is nothing at memory://unpublished"):
        remote.localised("memory://unpublished", suffixes)


def test_a_damaged_manifest_is_named(folder: Path, tmp_path: Path) -> None:
    """A number that still makes sense, in a store's manifest or in the preparation's."""
    text = (folder / "store.json").read_text()
    manifest = json.loads(text)
    assert list(verify_preparation(str(tmp_path), [str(folder)])) == []  # of no preparation
    whole = {"tokens": {"train": manifest}, "sources": {"a": {"licence": "CC0"}}}
    whole["sha256"] = own_sha256(whole)
    told = tmp_path / "manifest.json"
    told.write_text(json.dumps(whole))
    assert list(verify_preparation(str(tmp_path), [str(folder)])) == []
    told.write_text(json.dumps(whole).replace("CC0", "CC1"))
    (damage,) = verify_preparation(str(tmp_path), [str(folder)])
    assert "manifest.json is damaged (its sha256 is not its own)" in damage
    for broken in ("", "[]", "{}"):
        told.write_text(broken)
        assert len(list(verify_preparation(str(tmp_path), [str(folder)]))) == 1
    whole["tokens"]["train"]["sha256"] = "0"
    whole["sha256"] = own_sha256(whole)
    told.write_text(json.dumps(whole))
    (damage,) = verify_preparation(str(tmp_path), [str(folder)])
    assert "store.json is not of the preparation" in damage
    (folder / "store.json").write_text(text.replace('"end_id": 256', '"end_id": 255'))
    with pytest.raises(UserError, match=r"store\.json is no manifest .*its sha256 is not its own"):
        _ = Store(str(folder)).manifest
    (folder / "store.json").write_text(text)
    (folder / "tokenizer.json").write_text("{}")
    (damage,) = Store(str(folder)).verify()
    assert "tokenizer.json is not the one that made the tokens" in damage
