"""`python -m benchmarks.trust [--rounds=4] [--steps=3]`: what guarding a run costs per step.

The training loop with the guard, the watchdog, goodput, incidents and metrics against the bare
step (`worker_trust`), on configs/gpt2.py:124m at batch 4, length 256. Each arm is a process of its
own; they take turns. All is done twice, the other arm started first: what a process gets of the
machine's huge pages depends on who came before. Saves are not among the steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from benchmarks.train_step import Worker

BAR = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="of each half")
    parser.add_argument("--steps", type=int, default=3, help="of one turn")
    options = parser.parse_args()
    guarded: list[dict[str, float]] = []
    bare: list[dict[str, float]] = []
    for order in (("guarded", "bare"), ("bare", "guarded")):
        arms = {arm: Worker(arm, sys.executable, "benchmarks.worker_trust", arm) for arm in order}
        try:
            for number in range(options.rounds):
                for arm in order if number % 2 else reversed(order):
                    arms[arm].turn(options.steps)
                    time.sleep(0.3)
        finally:
            for worker in arms.values():
                worker.close()
        guarded += arms["guarded"].turns
        bare += arms["bare"].turns
    for what in ("wall_s", "cpu_s"):
        ratios = [a[what] / b[what] - 1 for a, b in zip(guarded, bare, strict=True)]
        middle = statistics.median(ratios)
        verdict = f", bar {BAR:.0%}: {'met' if middle < BAR else 'MISSED'}"
        print(
            f"{what}: {middle:+.2%} ({min(ratios):+.2%} to {max(ratios):+.2%}) "
            f"of {statistics.median(b[what] for b in bare) / options.steps:.3f} s a step"
            + (verdict if what == "wall_s" else "")
        )
    load = statistics.median(t["others_load"] for t in guarded + bare)
    print(f"others' load {load:.2f} cores")


if __name__ == "__main__":
    main()
