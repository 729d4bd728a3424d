"""`python -m benchmarks.generate [--cases=gpt2-124m-float32,...] [--rounds=5]`: decoding.

Greedy decoding of `python -m lmjax.generate` against `generate` of transformers, on all cores, the
same weights (published shapes at random numbers, made in build/ at the first use) in the same
dtype. For GPT-2 124M and SmolLM2-135M, 1 and 8 rows, prompts of 64 and of 448 tokens, 64 tokens
each. Each side is a process of its own; they take turns. The ratio is that of the time between the
first and the last token, without the prompt; that of the whole call stands beside it. Of Llamas in
float32, llama.cpp runs along on the same weights as GGUF, where xllamacpp can be installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.train_step import ROOT, Worker, torch_python

FOLDER = ROOT / "build" / "generate"
MODELS = ("gpt2-124m", "smollm2-135m")
BARS = {"float32": 1.5, "bfloat16": 1.15}
CASES = [f"{model}-{dtype}" for model in MODELS for dtype in BARS]
CELLS = [(rows, length) for rows in (1, 8) for length in (64, 448)]
NUM_TOKENS = 64


def weights(case: str, torch: str) -> Path:
    """The folder of a case's weights, with the run that was imported of it, made if need be."""
    folder, model = FOLDER / case, case.rpartition("-")[0]
    if not folder.exists():
        command = [torch, "-m", "benchmarks.worker_generate_torch", "make", str(FOLDER), model]
        subprocess.run(command, cwd=ROOT, check=True)
    convert = [sys.executable, "-m", "lmjax.convert"]
    run, file = folder / "run", folder / "weights.gguf"
    if not run.exists():
        command = [*convert, "import", f"--from={folder}", f"--workdir={run}"]
        subprocess.run(command, cwd=ROOT, check=True)
    if case == "smollm2-135m-float32" and not file.exists():
        command = [*convert, "export", f"--workdir={run}", f"--to={file}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def compare(case: str, *, rounds: int, torch: str, cells: list[tuple[int, int]]) -> list[Any]:
    """Runs the sides of a case in turns; returns what is to be printed of each cell."""
    folder = weights(case, torch)
    workers = [
        Worker("lmjax", sys.executable, "benchmarks.worker_generate", str(folder / "run")),
        Worker("transformers", torch, "benchmarks.worker_generate_torch", str(folder)),
    ]
    if (file := folder / "weights.gguf").exists():
        try:
            workers.append(
                Worker("llama.cpp", torch, "benchmarks.worker_generate_llama", str(file))
            )
        except RuntimeError as error:
            print(f"without llama.cpp: {str(error).splitlines()[-1]}", file=sys.stderr)
    found = []
    try:
        for rows, length in cells:
            for worker in workers:  # a turn that is not counted, in which everything is compiled
                worker.turn(rows, length, NUM_TOKENS)
                worker.turns.clear()
            for _ in range(rounds):
                for worker in workers:
                    worker.turn(rows, length, NUM_TOKENS)
                    time.sleep(0.3)  # threads that spin after their work have stopped by then
            found.append(summary(case, rows, length, workers))
            show(found[-1])
            for worker in workers:
                worker.turns.clear()
    finally:
        for worker in workers:
            worker.close()
    return found


def summary(case: str, rows: int, length: int, workers: list[Worker]) -> dict[str, Any]:
    """Medians of each side and of the ratios to ours, turn by turn."""
    ours, theirs, *_ = workers
    read = statistics.median(turn["read_bytes_per_s"] for turn in theirs.turns)
    result: dict[str, Any] = {
        "case": case,
        "rows": rows,
        "length": length,
        "bar": BARS[case.rpartition("-")[2]],
        "read_bytes_per_s": read,
        "others_load": statistics.median(turn["others_load"] for turn in ours.turns),
        "same_tokens": same(ours.turns[0]["tokens"], theirs.turns[0]["tokens"]),
        "sides": {},
    }
    for worker in workers:
        step_s = statistics.median(t["decode_s"] for t in worker.turns) / (NUM_TOKENS - 1)
        ratios = {
            what: [t[what] / own[what] for own, t in zip(ours.turns, worker.turns, strict=True)]
            for what in ("decode_s", "whole_s")
        }
        result["sides"][worker.label] = {
            "tokens_per_s": rows / step_s,
            "bandwidth": theirs.ready["weight_bytes"] / step_s / read,
            "versions": worker.ready["versions"],
            **{
                f"ratio_{what}": (min(one), statistics.median(one), max(one))
                for what, one in ratios.items()
            },
        }
    return result


def same(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens before the first that differs, over all rows."""
    equal = 0
    for one, other in zip(ours, theirs, strict=True):
        pairs = list(zip(one, other, strict=True))
        equal += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return equal / sum(map(len, ours))


def show(result: dict[str, Any]) -> None:
    """Prints one cell."""
    print(
        f"\n{result['case']}, {result['rows']} row(s), prompt of {result['length']} tokens "
        f"(memory read at {result['read_bytes_per_s'] / 1e9:.1f} GB/s, others' load "
        f"{result['others_load']:.2f} cores, {result['same_tokens']:.0%} of the texts the same)"
    )
    for label, side in result["sides"].items():
        line = (
            f"  {label:13} {side['tokens_per_s']:7.1f} tokens/s, weights read at "
            f"{side['bandwidth']:.0%} of the bandwidth"
        )
        if label != "lmjax":
            low, middle, high = side["ratio_decode_s"]
            line += f"; lmjax is {middle:.2f} times as fast ({low:.2f} to {high:.2f})"
            line += f", whole call {side['ratio_whole_s'][1]:.2f}"
        if label == "transformers":
            line += f", bar {result['bar']}: {'met' if middle >= result['bar'] else 'MISSED'}"
        print(f"{line} ({side['versions']})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--cells", default="", help="of the cases, as 1x64,8x448; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch", default="", help="the Python that holds torch and transformers")
    parser.add_argument("--json", default="", help="also write the results to this file")
    options = parser.parse_args()
    python = torch_python(options.torch)
    cells: list[tuple[int, int]] = CELLS
    if options.cells:
        cells = [
            (int(rows), int(length))
            for rows, _, length in (c.partition("x") for c in options.cells.split(","))
        ]
    results = []
    for case in options.cases.split(","):
        results += compare(case, rounds=options.rounds, torch=python, cells=cells)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
