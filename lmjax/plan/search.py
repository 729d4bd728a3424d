"""Changes that make a run fit or go faster, each tried by compiling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from lmjax.config import leaves
from lmjax.errors import UserError
from lmjax.plan.planner import Plan, Trial, make_plan
from lmjax.plan.topology import Topology

Load = Callable[[Mapping[str, str]], ConfigDict]
Change = dict[str, str]
SLACK = 1.5  # an estimate this far over the limit is not worth compiling
VOCAB_CHUNK = 8192
MAX_TENSOR, MAX_CONTEXT = 16, 8


def changes_that_save(config: ConfigDict, mesh: Mapping[str, int]) -> list[Change]:
    """What is commonly done against too little memory, as overrides of this config's fields."""
    fields = dict(leaves(config))
    found: list[Change] = []
    for name, value in fields.items():
        if name.startswith("evals."):
            continue  # no part of the step
        last = name.rpartition(".")[2]
        if last == "remat" and value != "full":
            found.append({name: "full"})
        if last == "remat" and value != "offload":
            found.append({name: "offload"})
        if last == "vocab_chunk" and value == 0:
            found.append({name: str(VOCAB_CHUNK)})
    microbatches = int(fields.get("microbatches", 1))
    found += [{"microbatches": str(microbatches * n)} for n in (2, 4)]
    if mesh.get("data", 1) > 1:
        found.append({"layout.data": "1", "layout.fsdp": "-1"})
    for axis in ("tensor", "context"):
        wider = str(mesh.get(axis, 1) * 2)
        found.append({"layout.data": "1", "layout.fsdp": "-1", f"layout.{axis}": wider})
    return found


def mend(
    load: Load,
    plan: Plan,
    topology: Topology,
    devices: Sequence[jax.Device],
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Tries the changes that save memory, one by one, and together if none alone suffices."""
    trials = []
    singles = changes_that_save(load({}), plan.mesh)
    for change in singles:
        if (trial := attempt(load, change, topology, devices)) is not None:
            trials.append(trial)
            say(describe(trial))
    if any(t.fits for t in trials):
        return _ranked(trials)
    together: Change = {}
    for trial in sorted(trials, key=lambda t: t.memory_bytes):
        if trial.memory_bytes >= plan.memory_bytes or together.keys() & trial.change.keys():
            continue  # saves nothing, or contradicts what saves more
        together = together | trial.change
        if together == trial.change:
            continue
        both = attempt(load, together, topology, devices)
        if both is not None:
            trials.append(both)
            say(describe(both))
            if both.fits:
                break
    return _ranked(trials)


def layouts(
    num_devices: int, slices: int, *, experts: bool, stages: int = 1
) -> Iterator[dict[str, int]]:
    """Layouts worth a look: whatever divides, tensor and context no wider than is sensible."""
    rest = num_devices // (slices * stages)
    for tensor in _powers(min(rest, MAX_TENSOR)):
        for context in _powers(min(rest // tensor, MAX_CONTEXT)):
            for expert in _powers(rest // (tensor * context)) if experts else (1,):
                left, remainder = divmod(rest, tensor * context * expert)
                if remainder:
                    continue
                for data in dict.fromkeys((1, left)):
                    yield {
                        "slices": slices,
                        "data": data,
                        "fsdp": left // data,
                        "tensor": tensor,
                        "context": context,
                        "expert": expert,
                        "stage": stages,
                    }


def search(
    load: Load,
    mesh: Mapping[str, int],
    topology: Topology,
    devices: Sequence[jax.Device],
    *,
    compiles: int = 4,
    say: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Looks over layouts by estimate, compiles the best few, and returns these, the best first.

    Args:
      mesh: of the config as it is; its stages are kept.
      compiles: how many that fit are asked for; up to three times as many are compiled,
        the fastest by estimate first, then those of least memory.
    """
    names = [name for name, _ in leaves(load({})) if not name.startswith("layout.")]
    experts = any("expert" in name.rpartition(".")[2] for name in names)
    candidates = []
    stages = mesh.get("stage", 1)
    for sizes in layouts(len(devices), topology.slices, experts=experts, stages=stages):
        change = {f"layout.{axis}": str(size) for axis, size in sizes.items()}
        trial = attempt(load, change, topology, devices, compiles=False)
        if trial is None:
            continue
        if topology.limit_bytes and trial.memory_bytes > SLACK * topology.limit_bytes:
            continue
        candidates.append(trial)
    say(f"{len(candidates)} layouts divide model, batch and devices, and may fit")
    candidates = _ranked(candidates)
    if topology.platform == "gpu" and devices[0].platform == "cpu":
        return candidates[:compiles]
    fastest, rest = candidates[: 2 * compiles], candidates[2 * compiles :]
    smallest = sorted(rest, key=lambda trial: trial.memory_bytes)[:compiles]
    compiled: list[Trial] = []
    for candidate in fastest + smallest:
        if sum(trial.fits for trial in compiled) == compiles:
            break
        trial = attempt(load, candidate.change, topology, devices)
        if trial is not None:
            compiled.append(trial)
            say(describe(trial))
    return _ranked(compiled)


def attempt(
    load: Load,
    change: Change,
    topology: Topology,
    devices: Sequence[jax.Device],
    *,
    compiles: bool = True,
) -> Trial | None:
    """The plan with a change, in short; None where the config does not take it."""
    try:
        plan = make_plan(load(change), topology, devices, compiles=compiles)
    except UserError:
        return None
    return Trial(
        change=change,
        fits=plan.fits,
        memory_bytes=plan.memory_bytes,
        step_s=plan.times.step_s,
        serial_s=plan.times.serial_s,
        mfu=plan.times.mfu,
        bound=plan.times.bound,
        refusal=plan.refusal.partition("\n")[0],
    )


def describe(trial: Trial) -> str:
    """One line on a trial."""
    change = " ".join(
        f"{name}={value}"
        for name, value in trial.change.items()
        if not (name.startswith("layout.") and value == "1")
    )
    speed = "" if trial.step_s is None else f", step {trial.step_s:.4g} s ({trial.bound})"
    return (
        f"{change or 'one device each for all axes'}: {'fits' if trial.fits else 'does not fit'}, "
        f"{trial.memory_bytes / 2**30:.2f} GiB{speed}"
    )


def _ranked(trials: list[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda t: (not t.fits, t.serial_s or math.inf, t.memory_bytes))


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(int(math.log2(max(limit, 1))) + 1)]
