"""A whole preparation: its records followed by hand, what it skips, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmjax.config import build, call, override
from lmjax.data.folder import Folder
from lmjax.data.pretrained import read_tokenizer
from lmjax.data.store import Store, own_sha256, verify_preparation
from lmjax.data.vocabulary import BPE, Pretrained
from lmjax.errors import UserError
from lmjax.prepare import exchange, tasks
from lmjax.prepare.backends import RUNNERS, backend
from lmjax.prepare.backends.inline import Inline
from lmjax.prepare.lock import alone
from lmjax.prepare.pipeline import Prepare, run, segments
from lmjax.prepare.read.jsonl import Jsonl
from lmjax.prepare.read.source import Source
from lmjax.prepare.split import SPLITS, Split
from lmjax.prepare.stage import QUARANTINED, Result
from lmjax.prepare.tokenise import Tokenise
from tests.prepare import small


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small.write_input(tmp_path_factory.mktemp("input") / "in")


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, run(small.prepare(str(inputs)), str(out), engine=Inline())


def by_hand(inputs: Path) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    """(id, text, group) of the records that are kept, and how many each stage left out."""
    records, bad = [], 0
    for file in sorted(inputs.glob("*.txt")):
        for i, line in enumerate(file.read_text().splitlines()):
            records.append((f"lines/{file.name}#{i}", line))
    for i, line in enumerate((inputs / "d.jsonl").read_text().split("\n")):
        try:
            records.append((f"objects/d.jsonl#{i}", json.loads(line)["text"]))
        except (ValueError, KeyError):
            bad += 1
    lost = {"read": bad}
    kept = [(name, text.lower()) for name, text in records if len(text) >= 4]
    lost["lower"] = len(records) - len(kept)
    first = {}
    for name, text in kept:
        first.setdefault(text, name)
    unique = [(name, text) for text, name in first.items()]
    lost["same"] = len(kept) - len(unique)
    shorts = Counter(text[:8].encode() for _, text in unique)
    groups, grouped = {}, []
    for name, text in unique:
        many = shorts[text[:8].encode()] > 1
        group = groups.setdefault(text[:16], name) if many else name
        grouped.append((name, text, group))
    out = [row for row in grouped if len(row[1]) >= 9]
    lost["again"] = len(grouped) - len(out)
    return out, lost


def records_of(out: Path, name: str) -> list[dict]:
    (folder,) = (out / "stages").glob(f"*-{name}-*")
    return [
        row for file in sorted(folder.glob("part-*")) for row in pq.read_table(file).to_pylist()
    ]


def test_every_record_is_where_it_should_be(inputs, done):
    out, manifest = done
    expected, lost = by_hand(inputs)
    found = records_of(out, "split")
    assert [(r["id"], r["text"], r["group"]) for r in found] == expected
    stages = {row["name"]: row for row in manifest["stages"]}
    for name, number in lost.items():
        assert stages[name]["rows"] - stages[name]["kept"] == number > 0
    assert stages["read"]["quarantined"] == {
        "no field 'text'": 1,
        "no JSON: unexpected end of data": 1,
    }
    assert stages["same"]["dropped"] == {"copy": lost["same"]}
    assert len(list((out / "stages").glob("00-*/part-*"))) > 5  # what met came from many shards


def test_groups_never_straddle_the_split(done):
    out, manifest = done
    split = {}
    for row in records_of(out, "split"):
        assert split.setdefault(row["group"], row["split"]) == row["split"]
    assert set(split.values()) == {"train", "valid"}
    told = {k: v["documents"] for k, v in manifest["tokens"].items()}
    assert told == Counter(row["split"] for row in records_of(out, "split"))


def test_the_stores_hold_the_texts(done):
    out, _ = done
    records = records_of(out, "split")
    for split in ("train", "valid"):
        store = Store(str(out / "tokens" / split))
        assert store.manifest["licences"] == {"lines": "CC0", "objects": "unknown"}
        assert store.manifest["weights"] == {"lines": 2.0, "objects": 1.0}
        texts = [row["text"] for row in records if row["split"] == split]
        assert store.manifest["tokens"] == sum(len(text) + 1 for text in texts)


def test_what_is_left_out_is_listed(done):
    out, _ = done
    (folder,) = (out / "stages").glob("*-same-*")
    rows = [r for f in sorted(folder.glob("dropped-*")) for r in pq.read_table(f).to_pylist()]
    texts = {row["id"]: row["text"] for row in records_of(out, "lower")}
    assert rows and all(texts[row["id"]] == texts[row["detail"]] for row in rows)
    bad = [
        json.loads(line) for line in (out / "quarantine" / "read.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in bad] == ["objects/d.jsonl#7", "objects/d.jsonl#99"]
    assert bad[0]["raw"] == '{"text": '


class Refuses:
    """An engine that runs nothing that is not done."""

    def map(self, tasks):
        done = [task.run() for task in tasks]
        assert not any(each.seconds for each in done), [type(t).__name__ for t in tasks]
        return done


class Counts:
    """An engine that counts the stages that took time."""

    def __init__(self):
        self.stages = Counter()

    def map(self, tasks):
        done = [task.run() for task in tasks]
        self.stages.update(name for each in done for name in each.seconds)
        return done


def test_nothing_is_done_twice(inputs, done):
    out, manifest = done
    before = small.tree(out)
    assert run(small.prepare(str(inputs)), str(out), engine=Refuses()) == manifest
    assert small.tree(out) == before


def test_a_change_runs_what_follows_from_it(inputs, done, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(done[0], out)
    same = small.prepare(str(inputs))
    changed = replace(same, stages={**same.stages, "again": small.Lower(least=20)})
    engine = Counts()
    run(changed, str(out), engine=engine)
    assert set(engine.stages) == {"again", "split", "tokens"}
    fresh = tmp_path / "fresh"
    run(changed, str(fresh), engine=Inline())
    found, expected = small.tree(out), small.tree(fresh)
    assert {name: found[name] for name in expected} == expected


def test_stages_of_earlier_configs_are_kept_until_pruned(inputs, done, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    same = small.prepare(str(inputs))
    changed = replace(same, stages={**same.stages, "again": small.Lower(least=20)})
    first = {folder.name for folder in (out / "stages").iterdir()}
    with caplog.at_level("INFO", "lmjax"):
        run(changed, str(out), engine=Inline())
    assert "3 folders of stages of earlier configs are kept for reuse. --prune" in caplog.text
    both = {folder.name for folder in (out / "stages").iterdir()}
    assert len(both - first) == 3  # again, split, tokens
    assert run(same, str(out), engine=Refuses()) == done[1]
    run(changed, str(out), engine=Refuses(), prune=True)
    left = {folder.name for folder in (out / "stages").iterdir()}
    assert len(first & left) == len(first) - 3 and both - first < left
    run(changed, str(tmp_path / "fresh"), engine=Inline())
    assert small.tree(out) == small.tree(tmp_path / "fresh")


def test_the_manifest_tells_everything(inputs, done, tmp_path):
    """And nothing of where or when: a copy of the input, of another time, gives the same."""
    out, manifest = done
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert list(verify_preparation(str(out), [str(out / f"tokens/{s}") for s in SPLITS])) == []
    records = records_of(out, "read")
    for name, held in manifest["sources"].items():
        pattern = "*.txt" if name == "lines" else "*.jsonl"
        files = list(inputs.glob(pattern))
        assert (held["files"], held["bytes"]) == (len(files), sum(f.stat().st_size for f in files))
        assert held["records"]["read"] == sum(row["source"] == name for row in records)
        assert held["licence"] == {"lines": "CC0", "objects": "unknown"}[name]
    for row in manifest["stages"]:
        gone = sum(row["dropped"].values()) + sum(row["quarantined"].values())
        assert row["rows"] == row["kept"] + gone and len(row["sha256"]) == 64
    for split, store in manifest["tokens"].items():
        told = json.loads((out / f"tokens/{split}/store.json").read_text())
        assert told == store and store["tokenizer_sha256"] and store["licences"] and store["code"]
        for shard in store["shards"]:
            for part, file in shard["files"].items():
                data = (out / f"tokens/{split}/{shard['name']}.{part}").read_bytes()
                assert file == {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    assert manifest["config"]["stages"]["lower"]["least"] == 4
    copied = shutil.copytree(inputs, tmp_path / "in", copy_function=shutil.copyfile)
    for file in copied.iterdir():
        os.utime(file, (1, 1))
    run(small.prepare(str(copied)), str(tmp_path / "out"), engine=Inline())
    text = (tmp_path / "out" / "manifest.json").read_text().replace(str(copied), str(inputs))
    again = json.loads(text)
    again["sha256"] = own_sha256(again)
    assert again == manifest


def test_a_published_tokenizer_that_changes_makes_other_tokens(inputs, tmp_path):
    file, pairs = tmp_path / "tokenizer.json", [BPE(vocab_size=n) for n in (260, 300)]
    held = []
    for vocabulary in pairs:
        made = vocabulary.learn(["To The Of And In The To The Of And In"], [])
        file.write_text(made.to_json())
        read_tokenizer.cache_clear()
        tokens = Tokenise(vocabulary=Pretrained(path=str(file)), engine="tokenizers")
        prepare = small.prepare(str(inputs), stages={}, shard_bytes=10**6, tokens=tokens)
        manifest = run(prepare, str(tmp_path / "out"), engine=Inline())
        assert run(prepare, str(tmp_path / "out"), engine=Refuses()) == manifest
        fresh = tmp_path / f"fresh{len(held)}"
        assert run(prepare, str(fresh), engine=Inline()) == manifest
        assert small.tree(tmp_path / "out" / "tokens") == small.tree(fresh / "tokens")
        held.append(manifest["tokens"]["train"]["tokens"])
    assert held[0] > held[1]


def test_a_changed_file_is_read_again_alone(tmp_path):
    inputs = small.write_input(tmp_path / "in")
    out = tmp_path / "out"
    run(small.prepare(str(inputs)), str(out), engine=Inline())
    text = (inputs / "b.txt").read_text()
    (inputs / "b.txt").write_text(text.replace("The", "And", 1))
    engine = Counts()
    run(small.prepare(str(inputs)), str(out), engine=engine)
    (folder,) = (out / "stages").glob("00-*")
    assert engine.stages["read"] < len(list(folder.glob("counts-*")))
    run(small.prepare(str(inputs)), str(tmp_path / "fresh"), engine=Inline())
    assert small.tree(out) == small.tree(tmp_path / "fresh")


@pytest.mark.parametrize("shard_bytes", [600, 10**6])
def test_shards_change_no_record(inputs, done, tmp_path, shard_bytes):
    prepare = small.prepare(str(inputs), shard_bytes=shard_bytes, tokens=None)
    run(prepare, str(tmp_path), engine=Inline())
    assert records_of(tmp_path, "split") == records_of(done[0], "split")


def test_memory_changes_no_record(inputs, done, tmp_path, monkeypatch):
    """What meets is cut into many pieces and parts."""
    monkeypatch.setattr(exchange, "_PART_BYTES", 100)
    monkeypatch.setattr(tasks, "_EVIDENCE_BYTES", 10)
    run(small.prepare(str(inputs)), str(tmp_path), engine=Inline())
    assert small.tree(tmp_path) == small.tree(done[0])


@dataclass(frozen=True, kw_only=True)
class Broken:
    how: str

    def __call__(self, records: pa.Table) -> Result:
        if self.how == "loses":
            return Result(kept=records.slice(1))
        if self.how == "reorders":
            return Result(kept=records.take(pa.array(range(len(records))[::-1])))
        if self.how == "twice":
            row = [{"id": records["id"][0].as_py(), "reason": "x"}]
            return Result(kept=records, quarantined=pa.Table.from_pylist(row, schema=QUARANTINED))
        raise ZeroDivisionError


@pytest.mark.parametrize("how", ["loses", "reorders", "twice"])
def test_a_stage_that_does_not_add_up_ends_the_run(inputs, tmp_path, how):
    prepare = small.prepare(str(inputs), stages={"bad": Broken(how=how)}, tokens=None)
    with pytest.raises(RuntimeError, match=r"'bad' does not account for its records"):
        run(prepare, str(tmp_path), engine=Inline())


def test_a_run_that_keeps_no_record_says_where_they_went(inputs, tmp_path):
    prepare = small.prepare(str(inputs), stages={"lower": small.Lower(least=10**6)})
    with pytest.raises(UserError, match=r"no record is left .*report\.md"):
        run(prepare, str(tmp_path), engine=Inline())
    told = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert [row["kept"] > 0 for row in told] == [True, False, False]
    assert "too short" in (tmp_path / "report.md").read_text()


def test_stages_are_cut_before_keyed_ones():
    stages = small.prepare("x").stages
    names = [[name for name, _ in segment] for segment in segments(stages)]
    assert names == [["lower"], ["same"], ["start", "again"]]


def test_config_keeps_the_order_of_stages():
    stages = {name: call(small.Lower, least=i) for i, name in enumerate("zebra")}
    made = build(call(Prepare, sources={"x": call(Source, path="x")}, stages=stages))
    assert [(name, stage.least) for name, stage in made.stages.items()] == list(
        zip("zebra", range(5), strict=True)
    )


def test_config_reaches_the_format():
    source = call(Source, path="x", format=call(Jsonl, text="body"))
    config = call(Prepare, sources={"x": source})
    override(config, "sources.x.format.text", "content")
    assert build(config).sources["x"].format == Jsonl(text="content")
    plain = call(Prepare, sources={"x": call(Source, path="x")})
    override(plain, "sources.x.format", "email")
    assert build(plain).sources["x"].format == "email"


def test_two_runs_in_one_folder_are_refused(tmp_path):
    out = Folder(str(tmp_path))
    with alone(out), pytest.raises(UserError, match="another run is at work"), alone(out):
        pass
    with alone(out):
        pass


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Prepare(sources={}), "sources is empty"),
        (lambda: small.prepare("x", stages={"read": small.Lower()}), "which is taken"),
        (lambda: small.prepare("x", stages={"a/b": small.Lower()}), "names a folder"),
        (lambda: small.prepare("x", stages={"a": 3}), "neither a Stage nor a Keyed"),
        (lambda: small.prepare("x", shard_bytes=0), "at least 1"),
        (
            lambda: Prepare(sources={"a": Source(path="x", weight=1.0), "b": Source(path="x")}),
            "'b' has no weight, and others have one",
        ),
        (lambda: Split(valid=1.0), r"in \[0, 1\)"),
        (lambda: Source(path="x", format="jsnl"), "Did you mean 'jsonl'"),
        (lambda: Source(path="x", weight=-1.0), "at least 0"),
        (lambda: backend("spark", workdir=""), "Allowed: " + ", ".join(sorted(RUNNERS))),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_split_is_about_the_share_and_each_seed_draws_another():
    records = pa.table({"id": [f"a#{i}" for i in range(4000)]})
    drawn = [Split(valid=0.1, seed=seed)(records).kept["split"].to_pylist() for seed in (0, 1)]
    shares = [each.count("valid") / 4000 for each in drawn]
    assert all(0.08 < share < 0.12 for share in shares) and drawn[0] != drawn[1]
    half = Split(valid=0.1)(records.slice(1000, 50)).kept["split"].to_pylist()
    assert half == drawn[0][1000:1050]
