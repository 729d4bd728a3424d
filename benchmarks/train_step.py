"""`python -m benchmarks.train_step [--cases=char-bf16,...] [--rounds=5]`: our step against torch's.

Each side is a process of its own; they take turns, so that what else the machine does falls on
both. Prints medians over the rounds. Torch has an environment of its own, made in build/ at the
first use; on a machine with a GPU, or with --torch=PYTHON, that Python's torch and transformers
are used instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, CPU, GPU, Case

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build" / "torch-env"
REQUIREMENTS = ["torch==2.13.0", "transformers==5.23.0"]


class Worker:
    """A side of the comparison in its own process."""

    def __init__(self, label: str, python: str, module: str, *arguments: str) -> None:
        self.label = label
        # A file: a pipe that nobody reads fills up and blocks.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, as it lives with the process
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.ready = self._answer()
        self.turns: list[dict[str, float]] = []

    def turn(self, *numbers: int) -> None:
        assert self.process.stdin is not None
        began, before = time.perf_counter(), machine_cpu_s()
        self.process.stdin.write(f"run {' '.join(map(str, numbers))}\n")
        self.process.stdin.flush()
        took = self._answer()
        elsewhere = machine_cpu_s() - before - took["turn_cpu_s"]
        took["others_load"] = max(elsewhere, 0.0) / (time.perf_counter() - began)
        self.turns.append(took)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.label} ended:\n{self.errors.read()[-3000:]}")
        return json.loads(line)


def machine_cpu_s() -> float:
    """CPU seconds that all processes of this machine have used; 0 where Linux does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def torch_python(given: str) -> str:
    """The interpreter that holds torch and transformers."""
    if given:
        return given
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / "done"
    if not done.exists():
        print(
            f"making {ENVIRONMENT.relative_to(ROOT)} with {' '.join(REQUIREMENTS)} ...", flush=True
        )
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        for requirement in REQUIREMENTS:  # torch first, or transformers draws another build of it
            subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
        done.touch()
    return str(python)


def compare(case: Case, *, rounds: int, torch: str, modes: list[str]) -> dict[str, Any]:
    """Runs both sides in turns and returns what is to be printed."""
    workers = [Worker("lmjax", sys.executable, "benchmarks.worker_lmjax", case.name)]
    for mode in modes:
        try:
            workers.append(
                Worker(f"torch {mode}", torch, "benchmarks.worker_torch", case.name, mode)
            )
        except RuntimeError as error:
            print(f"{case.name}: {error}", file=sys.stderr)
    try:
        for _ in range(rounds):
            for worker in workers:
                worker.turn(case.steps)
                time.sleep(0.3)  # threads that spin after their work have stopped by then
    finally:
        for worker in workers:
            worker.close()
    return summary(case, workers)


def summary(case: Case, workers: list[Worker]) -> dict[str, Any]:
    """Medians of each side, and of the ratio to the faster of theirs, turn by turn."""
    tokens = case.batch_size * case.length * case.steps
    rows: dict[str, Any] = {"case": case.name, "bar": case.bar, "sides": {}}
    for worker in workers:
        wall = statistics.median(t["wall_s"] for t in worker.turns)
        rows["sides"][worker.label] = {
            "tokens_per_s": tokens / wall,
            "tokens_per_cpu_s": tokens / statistics.median(t["cpu_s"] for t in worker.turns),
            "flop_per_s": case.flop_per_step() * case.steps / wall,
            "peak_bytes": max(t["peak_bytes"] for t in worker.turns),
            "others_load": statistics.median(t["others_load"] for t in worker.turns),
            **worker.ready,
        }
    ours, *theirs = workers
    if theirs:
        best = max(theirs, key=lambda w: rows["sides"][w.label]["tokens_per_s"])
        rows["against"] = best.label
        for what in ("wall_s", "cpu_s"):
            ratios = [b[what] / a[what] for a, b in zip(ours.turns, best.turns, strict=True)]
            rows[f"ratio_{what}"] = (min(ratios), statistics.median(ratios), max(ratios))
    return rows


def show(result: dict[str, Any]) -> None:
    """Prints one case."""
    print(f"\n{result['case']}")
    peak = max((s.get("matmul_flop_per_s", 0) for s in result["sides"].values()), default=0)
    for label, side in result["sides"].items():
        share = f", {side['flop_per_s'] / peak:.0%} of the matmul peak" if peak else ""
        print(
            f"  {label:15} {side['tokens_per_s']:10,.0f} tokens/s{share}, ready after "
            f"{side['compile_s']:.1f} s, {side['peak_bytes'] / 1e9:.2f} GB, others' load "
            f"{side['others_load']:.2f} cores ({side['versions']})"
        )
        if side.get("peak_flop_per_s"):
            per_token = side["tokens_per_s"] / side["peak_flop_per_s"]
            units = CASES[result["case"]].batch_size * CASES[result["case"]].length
            print(
                f"  {'':15} {side['device']}: "
                f"MFU {side['flop_causal'] / units * per_token:.1%} causal, "
                f"{side['flop_full'] / units * per_token:.1%} full"
            )
    if "against" in result:
        for what, name in (("wall_s", "tokens/s"), ("cpu_s", "tokens per cpu-second")):
            low, middle, high = result[f"ratio_{what}"]
            print(
                f"  ratio of {name} to {result['against']}: {middle:.2f} ({low:.2f} to {high:.2f})",
                end="",
            )
            bar = result["bar"] if what == "wall_s" else 0
            print(f", bar {bar}: {'met' if middle >= bar else 'MISSED'}" if bar else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases", default="", help=f"of {', '.join(CASES)}; those of the device by default"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch", default="", help="the Python that holds torch and transformers")
    parser.add_argument("--modes", default="eager,compiled", help="of torch; empty for ours alone")
    parser.add_argument("--json", default="", help="also write the results to this file")
    options = parser.parse_args()
    import jax

    gpu = jax.default_backend() == "gpu"
    names = options.cases.split(",") if options.cases else [c.name for c in (GPU if gpu else CPU)]
    modes = [mode for mode in options.modes.split(",") if mode]
    python = torch_python(options.torch or (sys.executable if gpu else "")) if modes else ""
    results = []
    for name in names:
        results.append(compare(CASES[name], rounds=options.rounds, torch=python, modes=modes))
        show(results[-1])
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
