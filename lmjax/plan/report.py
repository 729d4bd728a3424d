"""A plan as tables for a terminal, and the difference of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from lmjax.plan.planner import Plan
from lmjax.plan.search import describe

GIB = 2.0**30
Rows = list[tuple[str, ...]]
OVERLAP = "if all overlaps"


def print_plan(plan: Plan, console: Console) -> None:
    """Prints every part of a plan."""
    for title, rows in sections(plan):
        table = Table(
            title=title, title_justify="left", box=None, pad_edge=False, show_header=False
        )
        width = max(len(row) for row in rows)
        for i in range(width):
            table.add_column(justify="left" if i == 0 or i == width - 1 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for note in plan.notes:
        console.print(f"note: {note}")


def sections(plan: Plan) -> Iterator[tuple[str, Rows]]:
    """(title, rows) of each part of the report; the terminal and the HTML page show the same."""
    yield _title(plan), _model(plan)
    yield "FLOP of training on one " + plan.unit.removesuffix("s"), _flop(plan)
    yield "memory of one device", _memory(plan)
    if plan.exchanges:
        source = "" if plan.compile.compiled else " (expected, not compiled)"
        yield f"collectives of one step{source}", _exchanges(plan)
    yield "time of one step", _times(plan)
    yield f"the run of {plan.run.steps:,} steps", _run(plan)
    if plan.refusal or not plan.fits:
        reason = plan.refusal.partition("\n")[0] or "more than there is"
        yield "it does not fit", [("the compiler", reason), *_largest(plan)]
    if plan.trials:
        yield "changes that were tried", [(describe(trial),) for trial in plan.trials]
    yield "planning", _compile(plan)


def _title(plan: Plan) -> str:
    given = " ".join(f"{k}={v}" for k, v in plan.overrides.items())
    return f"{plan.config} {given}".strip() + f" on {plan.topology}"


def _model(plan: Plan) -> Rows:
    axes = " ".join(f"{a}={n}" for a, n in plan.mesh.items()) or "one device"
    chips = "" if plan.num_chips == plan.num_devices else f" on {plan.num_chips} chips"
    rows: Rows = [
        ("devices", f"{plan.num_devices} x {plan.device_kind}{chips}: {axes}"),
        ("parameters", f"{sum(plan.parameters.values()):,}"),
    ]
    rows += [(f"  {name}", f"{count:,}") for name, count in plan.parameters.items()]
    batch = f"{plan.units_per_step:,.0f} (batch {plan.batch_size}, {plan.microbatches} microbatch"
    rows.append((f"{plan.unit} per step", batch + ("es)" if plan.microbatches > 1 else ")")))
    return rows


def _flop(plan: Plan) -> Rows:
    rows: Rows = [("", "forward", "backward", "computed again", "")]
    parts = plan.executed_flop_per_unit
    for part, when in sorted(parts.items(), key=lambda item: -sum(item[1].values())):
        rows.append((part, *(f"{when[k]:.4g}" for k in ("forward", "backward", "recomputed")), ""))
    executed = sum(sum(when.values()) for when in parts.values())
    rows.append(("executed in all", f"{executed:.4g}", "", "", ""))
    rows.append(("model, causal attention", f"{plan.flop_per_unit['causal']:.4g}", "", "", ""))
    rows.append(("model, full attention", f"{plan.flop_per_unit['full']:.4g}", "", "", ""))
    return rows


def _memory(plan: Plan) -> Rows:
    rows: Rows = [(kind, size_text(size), "") for kind, size in plan.memory.items()]
    limit = f"of {plan.limit_bytes / GIB:,.2f} GiB" if plan.limit_bytes else "limit unknown"
    verdict = "fits" if plan.fits else "does NOT fit"
    rows.append(("all", size_text(plan.memory_bytes), f"{limit}: {verdict}"))
    if plan.limit_bytes and not plan.compile.compiled:
        rows.append(("", "", "an estimate: the program was not compiled"))
    return rows


def _exchanges(plan: Plan) -> Rows:
    rows: Rows = [("kind", "count", "sent by a device", "time", "mesh axes")]
    rows += [
        (e.kind, f"{e.count:,.0f}", size_text(e.bytes), _seconds(e.seconds), e.axes)
        for e in plan.exchanges
    ]
    return rows


def _times(plan: Plan) -> Rows:
    times = plan.times
    if times.step_s is None:
        return [("unknown", times.bound)]
    rows: Rows = [
        ("compute", _seconds(times.compute_s), "products at the peak of all devices"),
        ("HBM", _seconds(times.hbm_s), "memory traffic at full bandwidth"),
        ("network", _seconds(times.network_s), "collectives one after another"),
        ("step", _seconds(times.step_s), f"{OVERLAP}: bound by {times.bound}"),
        ("step", _seconds(times.serial_s), "if no collective overlaps"),
    ]
    if times.mfu is not None and times.mfu_full is not None and times.serial_s:
        ratio = times.step_s / times.serial_s
        rows.append(("MFU, causal", f"{times.mfu:.1%}", f"{times.mfu * ratio:.1%} without overlap"))
        full = f"{times.mfu_full * ratio:.1%} without overlap"
        rows.append(("MFU, full attention", f"{times.mfu_full:.1%}", full))
    rate = plan.units_per_step / times.step_s
    rows.append((f"{plan.unit} per second", f"{rate:,.0f}", OVERLAP))
    return rows


def _run(plan: Plan) -> Rows:
    run = plan.run
    rows: Rows = [(f"{plan.unit} in all", f"{run.units:,.0f}"), ("FLOP in all", f"{run.flop:.4g}")]
    if run.days is not None and run.chip_hours is not None and run.hours is not None:
        took = f"{run.hours:.3g} hours" if run.days < 2 else f"{run.days:,.1f} days"
        rows.append(("duration", f"{took}, {OVERLAP}"))
        rows.append(("chip-hours", f"{run.chip_hours:,.1f}"))
    if run.money is not None:
        rows.append(("price", f"{run.money:,.2f}"))
    rows.append(
        (
            "Chinchilla-optimal",
            f"{run.chinchilla_parameters:.3g} parameters on {run.chinchilla_tokens:.3g} tokens for "
            "the same FLOP (20 tokens a parameter, arXiv:2203.15556)",
        )
    )
    return rows


def _largest(plan: Plan) -> Rows:
    return [
        (size_text(size), f"{shape} in {where}, if split over all devices")
        for size, shape, where in plan.largest
    ]


def _compile(plan: Plan) -> Rows:
    took = plan.compile
    wall = f"{took.wall_s:.1f} s, {took.cpu_s:.1f} cpu-s" if took.wall_s > 0.05 else "not done"
    return [
        ("tracing", f"{took.trace_s:.1f} s"),
        ("compiling", wall),
        ("peak memory of the planner", f"{took.peak_rss_bytes / GIB:.2f} GiB"),
    ]


def size_text(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", GIB), ("MiB", 2.0**20)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 2**10:,.2f} KiB"


def _seconds(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,.3f} s" if value >= 0.1 else f"{value * 1e3:,.3f} ms"


def numbers(plan: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a plan's JSON by its path; collectives by kind and axes."""
    found: dict[str, float] = {}
    for key, value in plan.items():
        path = f"{prefix}{key}"
        if key == "exchanges":
            for e in value:
                name = f"{path}/{e['kind']} over {e['axes']}"
                found |= {f"{name}/{what}": e[what] for what in ("count", "bytes", "seconds")}
        elif isinstance(value, Mapping):
            found |= numbers(value, f"{path}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path] = value
    return found


def compare(plan: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, other's, this one's, change) of every number that differs; planning's own is left out.

    Texts (config, topology, refusal) that differ come first.
    """
    rows = []
    for key in ("config", "topology", "device_kind", "refusal"):
        if plan.get(key) != other.get(key):
            rows.append((key, str(other.get(key)), str(plan.get(key)), ""))
    new, old = numbers(plan), numbers(other)
    for path in {**old, **new}:
        if path.startswith("compile/"):
            continue
        before, after = old.get(path), new.get(path)
        if before != after:
            change = f"{after / before - 1:+.1%}" if before and after is not None else ""
            rows.append((path, _number(before), _number(after), change))
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.6g}"
