"""The picture of a run: losses, learning rate, gradient norm and throughput over steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmjax.engine.lines import read_lines

MAX_POINTS = 2000  # per line; more cannot be seen and only slow the drawing


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, but for damaged ones."""
    return [row for row in read_lines(path) if row and type(row.get("step")) is int]


def draw_curves(
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    unit: str,
    loss_unit: str = "",
) -> None:
    """Writes a PNG of 2 x 2 panels from metric rows, each a mapping with `step` and numbers.

    `unit` is what throughput is counted in, `loss_unit` what the loss is in, if it has a unit.
    """
    import vl_convert

    rows = list(rows)
    loss = f"loss ({loss_unit})" if loss_unit else "loss"
    panels = [
        (loss, {"loss": "training"} | {k: k.removesuffix("/loss") for k in _evals(rows)}),
        ("learning rate", {"learning_rate": ""}),
        ("gradient norm", {"grad_norm": ""}),
        (f"{unit} per second", {f"{unit}_per_s": ""}),
    ]
    charts = [_panel(name, rows, series) for name, series in panels]
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "title": {"text": title, "anchor": "start", "fontSize": 16, "offset": 12},
        "vconcat": [{"hconcat": charts[:2]}, {"hconcat": charts[2:]}],
        "config": {"axis": {"labelFontSize": 12, "titleFontSize": 12, "gridColor": "#eee"}},
    }
    Path(path).write_bytes(vl_convert.vegalite_to_png(json.dumps(spec), scale=1.5))


def _evals(rows: list[Mapping[str, Any]]) -> list[str]:
    return sorted({key for row in rows for key in row if key.endswith("/loss")})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _panel(name: str, rows: list[Mapping[str, Any]], series: Mapping[str, str]) -> dict[str, Any]:
    points = []
    for key, label in series.items():
        line = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
        thinned = line[:: max(1, len(line) // MAX_POINTS)]
        points += [{"step": step, "value": value, "series": label} for step, value in thinned]
    mark: dict[str, Any] = {"type": "line", "strokeWidth": 1.5, "clip": True}
    if any(sum(p["series"] == label for p in points) == 1 for label in series.values()):
        mark["point"] = True  # a line of one point is not seen
    color: dict[str, Any] = {"value": "#3366aa"}
    if len(series) > 1:
        legend = {
            "title": None,
            "orient": "none",
            "legendX": 340,
            "legendY": 8,
            "labelFontSize": 12,
        }
        color = {
            "field": "series",
            "type": "nominal",
            "sort": list(series.values()),
            "legend": legend,
        }
    return {
        "width": 420,
        "height": 220,
        "data": {"values": points},
        "mark": mark,
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step"},
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": name,
                "scale": {"zero": False},
                "axis": {"format": "~g" if name == "learning rate" else "~s"},
            },
            "color": color,
        },
    }
