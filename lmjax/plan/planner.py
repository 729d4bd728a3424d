"""A plan: what one config needs on one topology, from the very program that the launcher runs."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from ml_collections import ConfigDict

from lmjax.config import build
from lmjax.engine.program import Draft, Program
from lmjax.engine.run import Run, draft_run
from lmjax.errors import UserError
from lmjax.plan import cost, estimate, flop, hlo, memory, traffic
from lmjax.plan.collectives import Collective, collectives
from lmjax.plan.topology import Topology, first_line

LARGEST = 8  # tensors that are named where it does not fit


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Collectives of one kind over the same mesh axes, summed: bytes are what one device sends."""

    kind: str
    axes: str
    count: float
    bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Compile:
    """What planning itself took; `compiled` is False where the compiler did not run or refused."""

    compiled: bool
    trace_s: float
    wall_s: float
    cpu_s: float
    peak_rss_bytes: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A change that was tried by compiling: what it does to memory and time."""

    change: dict[str, str]
    fits: bool
    memory_bytes: float
    step_s: float | None
    serial_s: float | None
    mfu: float | None
    bound: str
    refusal: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the report says; as JSON, what `--compare` and the budget goldens read.

    Args:
      mesh: axes of more than one device.
      parameters: by part.
      flop_per_unit: of training on one token: causal and full attention.
      executed_flop_per_unit: part -> forward, backward, recomputed.
      memory: bytes per device by kind; the sum is what a device needs.
      limit_bytes: what a program may use; 0 where that is not known.
      exchanges: the collectives of a step.
      refusal: what the compiler said where it did not compile.
      largest: (bytes, shape, where) of the largest arrays, on one device if all split them.
      trials: changes that were tried.
    """

    config: str
    overrides: dict[str, str]
    topology: str
    num_devices: int
    num_chips: int
    device_kind: str
    mesh: dict[str, int]
    batch_size: int
    microbatches: int
    unit: str
    units_per_step: float
    parameters: dict[str, int]
    flop_per_unit: dict[str, float]
    executed_flop_per_unit: dict[str, dict[str, float]]
    memory: dict[str, float]
    limit_bytes: float
    fits: bool
    exchanges: list[Exchange]
    hbm_traffic_bytes: float | None
    times: cost.Times
    run: cost.RunCost
    compile: Compile
    refusal: str = ""
    largest: list[tuple[float, str, str]] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def memory_bytes(self) -> float:
        """What one device needs."""
        return memory.total(self.memory)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {**dataclasses.asdict(self), "memory_bytes": self.memory_bytes}


def make_plan(
    config: ConfigDict,
    topology: Topology,
    devices: Sequence[jax.Device],
    *,
    name: str = "",
    overrides: Mapping[str, str] | None = None,
    price_per_chip_hour: float = 0.0,
    compiles: bool = True,
) -> Plan:
    """Traces and, where `compiles` and the topology allow it, compiles a config's step.

    Raises:
      UserError: for a config that cannot be built, laid out, traced or lowered; the compiler's
        reason is attached. Too little memory is no error: the plan says so.
    """
    run = build(config)
    if not isinstance(run, Run):
        raise UserError(f"{name or 'the config'} does not record a Run: nothing to plan.")
    draft, trace_s = _draft(run, topology, devices, name)
    clocks = time.perf_counter(), time.process_time()
    stand_in = topology.platform == "gpu" and devices[0].platform == "cpu"
    compiles = compiles and not stand_in
    program, refusal = _compile(draft, topology, name) if compiles else (None, "")
    spent = Compile(
        compiled=program is not None,
        trace_s=trace_s,
        wall_s=time.perf_counter() - clocks[0],
        cpu_s=time.process_time() - clocks[1],
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    )
    work = run.task.work(run.data.example)
    units = float(run.batch_size * work.units)
    executed = flop.executed(draft.jaxpr)
    parts, found, moved, notes = _account(draft, program, run, units, refusal)
    if stand_in:
        notes.append(
            "not compiled, so that memory and network are estimates: the compiler of GPUs comes "
            "with pip install 'lmjax[plan-gpu]'."
        )
    limit = topology.limit_bytes
    seconds = [cost.seconds(topology, c, list(draft.mesh.devices.flat)) for c in found]
    times = cost.roofline(
        topology,
        executed_flop=sum(sum(when.values()) for when in executed.values()),
        model_flop=run.batch_size * work.flop,
        model_flop_full=run.batch_size * work.flop_full,
        hbm_bytes=moved,
        network_s=sum(seconds),
    )
    fits = not refusal and (not limit or memory.total(parts) <= limit)
    return Plan(
        config=name,
        overrides=dict(overrides or {}),
        topology=topology.name,
        num_devices=topology.num_devices,
        num_chips=topology.num_chips,
        device_kind=topology.device_kind,
        mesh={a: n for a, n in draft.mesh.shape.items() if n > 1},
        batch_size=run.batch_size,
        microbatches=run.microbatches,
        unit=work.unit,
        units_per_step=units,
        parameters=dict(run.task.count_params(draft.abstract_state.variables()["params"])),
        flop_per_unit={"causal": work.flop / work.units, "full": work.flop_full / work.units},
        executed_flop_per_unit={
            part: {when: value / units for when, value in whens.items()}
            for part, whens in executed.items()
        },
        memory=parts,
        limit_bytes=limit,
        fits=fits,
        exchanges=_summed(found, seconds),
        hbm_traffic_bytes=moved,
        times=times,
        run=cost.run_cost(
            steps=run.steps,
            units_per_step=units,
            flop_per_step=run.batch_size * work.flop,
            step_s=times.step_s,
            num_chips=topology.num_chips,
            price_per_chip_hour=price_per_chip_hour,
        ),
        compile=spent,
        refusal=refusal,
        largest=[
            (size / topology.num_devices, shape, where)
            for size, shape, where in flop.largest(draft.jaxpr, LARGEST)
        ],
        notes=notes,
    )


def _draft(
    run: Run, topology: Topology, devices: Sequence[jax.Device], name: str
) -> tuple[Draft, float]:
    started = time.perf_counter()
    try:
        return draft_run(run, devices=devices), time.perf_counter() - started
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name or 'the config'} cannot be traced for {topology.name}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _compile(draft: Draft, topology: Topology, name: str) -> tuple[Program | None, str]:
    """The program, or None and the refusal where the memory does not suffice."""
    try:
        return draft.compile(), ""
    except Exception as error:
        if memory.refused(str(error)) is not None:
            return None, str(error).strip()
        raise UserError(
            f"{name or 'the config'} does not compile for {topology.name}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _account(
    draft: Draft, program: Program | None, run: Run, units: float, refusal: str
) -> tuple[dict[str, float], list[Collective], float | None, list[str]]:
    """Memory by kind, collectives, memory traffic, notes."""
    if program is not None:
        module = hlo.parse(program.compiled.as_text())
        state_bytes, temporary_bytes = memory.compiled_bytes(program)
        parts = memory.by_kind(
            draft,
            temporary_bytes=temporary_bytes,
            state_bytes=state_bytes,
            activation_bytes=traffic.kept_bytes(module),
        )
        found = collectives(module, dict(draft.mesh.shape))
        return parts, found, traffic.hbm_bytes(module), _replicated(found, draft)
    parts = memory.estimate(draft)
    if asked := memory.refused(refusal):
        rest = parts[memory.ACTIVATIONS] + parts[memory.TEMPORARIES] + parts[memory.GRADIENTS]
        if asked[0] == asked[0]:  # the compiler's number stands for the estimated kinds
            scale = asked[0] / rest if rest else 0.0
            for kind in (memory.GRADIENTS, memory.ACTIVATIONS, memory.TEMPORARIES):
                parts[kind] *= scale
    expected = estimate.expected(draft, units_per_step=units, microbatches=run.microbatches)
    return parts, expected, None, []


def _replicated(found: Sequence[Collective], draft: Draft) -> list[str]:
    """What full gradient all-reduces cost where parameters are sharded over `fsdp`."""
    if draft.mesh.shape.get("fsdp", 1) == 1:
        return []
    wasted = sum(
        c.sent_bytes / 2
        for c in found
        if c.kind == "all-reduce" and "fsdp" in c.axes and c.payload_bytes > 2**20
    )
    if not wasted:
        return []
    return [
        f"the compiler kept full all-reduces over fsdp, of gradients: {wasted / 1e9:.3g} GB a step "
        "and device more than reduce-scatters would send."
    ]


def _summed(found: Sequence[Collective], seconds: Sequence[float]) -> list[Exchange]:
    rows: dict[tuple[str, str], list[float]] = {}
    for collective, duration in zip(found, seconds, strict=True):
        row = rows.setdefault((collective.kind, " ".join(collective.axes)), [0.0, 0.0, 0.0])
        for i, value in enumerate((collective.times, collective.sent_bytes, duration)):
            row[i] += value
    return sorted(
        (
            Exchange(kind=kind, axes=axes, count=row[0], bytes=row[1], seconds=row[2])
            for (kind, axes), row in rows.items()
        ),
        key=lambda e: -e.bytes,
    )
