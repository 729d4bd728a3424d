"""What an evaluation found, as JSON and as a table."""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from lmjax.engine.manifest import versions
from lmjax.engine.stored import find
from lmjax.errors import UserError

Results = Mapping[str, Mapping[str, Any]]  # by task, then by metric


def record(
    workdir: str | Path,
    step: int,
    *,
    tokenizer: str | None,
    settings: Mapping[str, Any],
    results: Results,
) -> dict[str, Any]:
    """The results with all that they depend on.

    That is the run and its step, `checkpoint` (the sha256 of its manifest, which holds a checksum
    of every array), `tokenizer` (its sha256, of text), settings, versions of the libraries, the
    devices.
    """
    (stored,) = find(workdir, step)
    found = versions()
    try:
        found["lm_eval"] = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        found["lm_eval"] = "none"
    devices = jax.devices()
    return {
        "workdir": str(Path(workdir).absolute()),
        "step": step,
        "checkpoint": stored.manifest()["sha256"],
        **({} if tokenizer is None else {"tokenizer": tokenizer}),
        "settings": dict(settings),
        "versions": found,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": results,
    }


def check_out(out: str | Path) -> None:
    """Makes the folder of a file that is to be written; raises UserError where it cannot be."""
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out: {out} is a folder: name a file in it, as {path / 'results.json'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {path.parent} cannot be made: {error.strerror}.") from error


def write(out: str | Path, found: Mapping[str, Any]) -> None:
    """Writes a record."""
    Path(out).write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", "utf-8")


def finite(results: Results) -> dict[str, dict[str, Any]]:
    """The results with None, which JSON has, for numbers that are not finite."""
    return {
        task: {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in numbers.items()
        }
        for task, numbers in results.items()
    }


def show(results: Results, console: Console) -> None:
    """Prints the results, a line for each metric; of lm-evaluation-harness with standard error."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± stderr", justify="right")
    before = ""
    for task, metrics in results.items():
        for name, value, error in _lines(metrics):
            shown = f"{error:.4g}" if isinstance(error, float) else ""
            table.add_row(task if task != before else "", name, _number(value), shown)
            before = task
    console.print(table)


def _lines(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, standard error) of each metric; the harness writes 'acc,FILTER'."""
    for name, value in metrics.items():
        metric, _, kind = name.partition(",")
        if isinstance(value, str) or metric.endswith("_stderr") or name == "sample_len":
            continue
        shown = metric if kind in ("", "none") else f"{metric} ({kind})"
        yield shown, value, metrics.get(f"{metric}_stderr,{kind}")


def _number(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if isinstance(value, float) else str(value)
