"""What two presets may cost on three pods; `python -m tests.plan.budget` measures it anew.

Each is compiled in a process of its own: libtpu's compiler keeps what it has seen.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).with_suffix(".json")
COMMON = {"batch_size": "512", "data.length": "128", "task.model.dim": "256"}
PRESETS = {
    "gpt2": ("configs/gpt2.py:smoke", {"task.model.max_length": "128", "task.model.unroll": "1"}),
    "llama": (
        "configs/llama.py:smoke",
        {"task.model.num_kv_heads": "4", "task.model.hidden": "512"},
    ),
}
TOPOLOGIES = {"v5e:4x4": 4, "v5p:4x4x4": 16, "v6e:16x16": 64}  # and fsdp; the rest is tensor


def cases():
    return [(preset, topology) for preset in PRESETS for topology in TOPOLOGIES]


def measure(preset: str, topology: str) -> dict[str, float]:
    """Counts and bytes of collectives by kind and axes, and bytes of memory, of one device."""
    config, overrides = PRESETS[preset]
    layout = {"layout.data": "1", "layout.fsdp": str(TOPOLOGIES[topology]), "layout.tensor": "-1"}
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--config.{k}={v}" for k, v in {**COMMON, **overrides, **layout}.items()]
        command = [sys.executable, "-m", "lmjax.plan", f"--config={config}", *flags]
        file = Path(folder) / "plan.json"
        done = subprocess.run(
            [*command, f"--topology={topology}", f"--json={file}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{preset} on {topology}: {done.stderr}")
        plan = json.loads(file.read_text())
    found = {"memory, bytes": plan["memory_bytes"]}
    for exchange in plan["exchanges"]:
        name = f"{exchange['kind']} over {exchange['axes']}"
        found |= {f"{name}, {what}": exchange[what] for what in ("count", "bytes")}
    return found


if __name__ == "__main__":
    budget = {f"{p} on {t}": measure(p, t) for p, t in cases()}
    STORED.write_text(json.dumps(budget, indent=1) + "\n")
