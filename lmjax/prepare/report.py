"""What became of every record: the report for people, and the manifest for machines."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmjax.data.folder import Folder
from lmjax.data.store import PREPARATION, own_sha256
from lmjax.prepare.identity import digest
from lmjax.prepare.read.source import Source
from lmjax.prepare.shelf import Outcome, write_json
from lmjax.prepare.tasks import Done

if TYPE_CHECKING:
    from lmjax.prepare.pipeline import Prepare

log = logging.getLogger("lmjax")

FORMAT = "lmjax preparation 1"
_SUMMED = ("dropped", "quarantined", "counts", "sources")


class Account:
    """The books of a run: for each stage the sum of its shards' outcomes."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, int]] = {}
        self.code = ""
        self._seconds: dict[str, list[float]] = {}

    def begin(self, name: str, folder: str, key: str) -> None:
        """Opens the account of a stage; `key` identifies it and all before it."""
        zero = {"folder": folder, "sha256": "", "rows": 0, "kept": 0, "text_bytes": 0}
        self.stages[name] = {**zero, **{each: Counter() for each in _SUMMED}}
        self._seconds[name] = [0.0, 0.0]
        self.code = key

    def book(self, done: Done) -> None:
        """Adds what a task brought back."""
        for name, outcome in done.outcomes.items():
            if name in self.stages:
                self._add(self.stages[name], outcome)
        for name, (wall, cpu) in done.seconds.items():
            self._seconds[name][0] += wall
            self._seconds[name][1] += cpu

    def rows(self) -> list[dict[str, Any]]:
        """The stages as the report lists them; RuntimeError where one does not add up."""
        rows = []
        before = None
        for name, held in self.stages.items():
            lost = sum(held["dropped"].values()) + sum(held["quarantined"].values())
            if held["rows"] != held["kept"] + lost or before not in (None, held["rows"]):
                raise RuntimeError(
                    f"the stage {name!r} does not add up: {before} records came to it, "
                    f"{held['rows']} went in, {held['kept']} were kept and {lost} were not."
                )
            before = held["kept"]
            sums = {each: dict(sorted(held[each].items())) for each in _SUMMED}
            rows.append({"name": name, **held, **sums})
        return rows

    def about(self, sources: Mapping[str, Source]) -> dict[str, Any]:
        """What the manifest of a token store says of where its tokens come from."""
        return {
            "licences": {name: source.licence for name, source in sources.items()},
            "weights": {name: source.weight for name, source in sources.items()},
            "code": {"lmjax": _version(), "sha256": self.code},
        }

    def write(
        self, out: Folder, prepare: Prepare, config: Any, stores: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Writes report, quarantine, timing and manifest; returns the manifest."""
        stages = self.rows()
        report = {"invariant": "rows = kept + dropped + quarantined, at each stage", "holds": True}
        write_json(out, "report.json", {**report, "stages": stages})
        out.write("report.md", spell(stages).encode())
        for row in stages:
            _write_quarantine(out, row)
        timing = {
            name: {"clock_s": round(wall, 3), "cpu_s": round(cpu, 3)}
            for name, (wall, cpu) in self._seconds.items()
        }
        write_json(out, "timing.json", {"stages": timing})
        manifest = {
            "format": FORMAT,
            **self.about(prepare.sources),
            "sources": {
                name: {
                    "path": source.path,
                    "licence": source.licence,
                    "weight": source.weight,
                    **self.files.get(name, {}),
                    "records": {row["name"]: row["sources"].get(name, 0) for row in stages},
                }
                for name, source in prepare.sources.items()
            },
            "stages": stages,
            "tokens": stores,
            "config": config,
        }
        manifest["sha256"] = own_sha256(manifest)
        write_json(out, PREPARATION, manifest)
        return manifest

    @staticmethod
    def _add(held: dict[str, Any], outcome: Outcome) -> None:
        for each in ("rows", "kept", "text_bytes"):
            held[each] += outcome[each]
        parts = [held["sha256"], *(part["sha256"] for part in outcome["parts"])]
        held["sha256"] = digest(parts)  # of all that is kept, shard by shard
        for each in _SUMMED:
            held[each].update(outcome[each])


def spell(stages: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown: a table of the stages, then the reasons and counts of each."""
    lines = [
        "# Report",
        "",
        "At each stage records in = kept + dropped + quarantined. A stage's folder lists those "
        "that were left out by id and reason.",
        "",
        "| stage | in | kept | dropped | quarantined | MB of text |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in stages:
        dropped, bad = (sum(row[each].values()) for each in ("dropped", "quarantined"))
        size = row["text_bytes"] / 1e6
        lines.append(
            f"| {row['name']} | {row['rows']:,} | {row['kept']:,} | {dropped:,} | {bad:,} "
            f"| {size:,.1f} |"
        )
    for row in stages:
        told = [
            *_items("dropped: ", row["dropped"]),
            *_items("quarantined: ", row["quarantined"]),
            *_items("", row["counts"]),
        ]
        if told:
            lines += ["", f"## {row['name']}", *told]
    return "\n".join(lines) + "\n"


def _items(what: str, counts: Mapping[str, int]) -> Iterable[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return (f"- {what}{' '.join(name.split())}: {count:,}" for name, count in ranked if count)


def _write_quarantine(out: Folder, row: Mapping[str, Any]) -> None:
    """All quarantined rows of a stage in one file of JSON lines; none where there are none."""
    name = f"quarantine/{row['name']}.jsonl"
    if not row["quarantined"]:
        out.remove([name])
        return
    folder = out / f"stages/{row['folder']}"
    with out.create(name) as lines:
        for file in folder.names("quarantined-*.parquet"):
            for bad in pq.read_table(pa.BufferReader(folder.read(file))).to_pylist():
                lines.write(json.dumps(bad, ensure_ascii=False).encode() + b"\n")
    log.warning(
        "%s: %d records could not be handled: %s",
        row["name"],
        sum(row["quarantined"].values()),
        out.at(name),
    )


def _version() -> str:
    try:
        return importlib.metadata.version("lmjax")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return ""
