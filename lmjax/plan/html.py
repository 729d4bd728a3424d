"""A plan as one HTML page without scripts: two pictures, and the tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from lmjax.plan.planner import Plan
from lmjax.plan.report import GIB, sections

COLOURS = ("#4477aa", "#66ccee", "#bbbbbb", "#ccbb44", "#ee6677", "#aa3377")  # Paul Tol, bright
WIDTH, BAR, LEFT = 860, 44, 10
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 900px; color: #222; }
h1 { font-size: 1.3em; } h2 { font-size: 1.05em; margin: 1.6em 0 .4em; }
table { border-collapse: collapse; } td { padding: .12em 1.2em .12em 0; vertical-align: top; }
td:not(:first-child):not(:last-child) { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: #b00; }
"""


def page(plan: Plan) -> str:
    """The whole page."""
    parts = list(sections(plan))
    body = [f"<h1>{escape(parts[0][0])}</h1>"]
    verdict = "fits" if plan.fits else '<span class="bad">does not fit</span>'
    body.append(f"<p>It {verdict}. Step time: {escape(_step(plan))}.</p>")
    body.append("<h2>memory of one device by kind</h2>" + memory_picture(plan))
    if plan.times.step_s is not None:
        body.append("<h2>time of one step by bound</h2>" + time_picture(plan))
    for title, rows in parts:
        cells = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        body.append(f"<h2>{escape(title)}</h2><table>{cells}</table>")
    body += [f"<p>note: {escape(note)}</p>" for note in plan.notes]
    title = escape(f"plan: {plan.config} on {plan.topology}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _step(plan: Plan) -> str:
    times = plan.times
    if times.step_s is None or times.serial_s is None:
        return times.bound
    return (
        f"{times.step_s:.4g} s if all overlaps (bound by {times.bound}), "
        f"{times.serial_s:.4g} s if no collective does"
    )


def memory_picture(plan: Plan) -> str:
    """A stacked bar of the kinds, with the limit as a line."""
    sizes = {kind: size / GIB for kind, size in plan.memory.items()}
    return _stacked(sizes, "GiB", plan.limit_bytes / GIB)


def time_picture(plan: Plan) -> str:
    """A bar for each bound; of the network, a stack of its collectives."""
    times = plan.times
    network = {f"{e.kind} ({e.axes})": e.seconds * 1e3 for e in plan.exchanges if e.seconds}
    bars = {
        "compute": {"compute": (times.compute_s or 0.0) * 1e3},
        "HBM": {"HBM": (times.hbm_s or 0.0) * 1e3},
        "network": network,
    }
    longest = max(sum(parts.values()) for parts in bars.values()) or 1.0
    rows, y = [], 0
    colours = {"compute": COLOURS[0], "HBM": COLOURS[3]}
    for name, parts in bars.items():
        x = 90.0
        total = sum(parts.values())
        rows.append(f'<text x="{LEFT}" y="{y + 27}">{name}</text>')
        for i, (part, value) in enumerate(parts.items()):
            width = value / longest * (WIDTH - 210)
            colour = colours.get(part, COLOURS[(i + 4) % len(COLOURS)])
            rows.append(_rect(x, y + 5, width, colour, f"{part}: {value:,.3f} ms"))
            x += width
        rows.append(f'<text x="{x + 6:.1f}" y="{y + 27}">{total:,.2f} ms</text>')
        y += BAR + 4
    legend, height = _legend(
        {part: COLOURS[(i + 4) % len(COLOURS)] for i, part in enumerate(network)}, y + 12
    )
    return _svg("".join(rows) + legend, height)


def _stacked(parts: Mapping[str, float], unit: str, limit: float) -> str:
    total = sum(parts.values())
    scale = (WIDTH - 2 * LEFT) / (max(total, limit) or 1.0)
    rows, x = [], float(LEFT)
    for colour, (name, value) in zip(COLOURS, parts.items(), strict=False):
        rows.append(_rect(x, 22, value * scale, colour, f"{name}: {value:,.3f} {unit}"))
        x += value * scale
    if limit:
        line = LEFT + limit * scale
        anchor = "end" if line > WIDTH / 2 else "start"
        rows.append(
            f'<line x1="{line:.1f}" x2="{line:.1f}" y1="14" y2="{30 + BAR}" stroke="#b00" '
            f'stroke-width="2"/><text x="{line:.1f}" y="12" text-anchor="{anchor}">limit '
            f"{limit:,.2f} {unit}</text>"
        )
    shown = {
        f"{name} {value:,.3g} {unit}": colour
        for colour, (name, value) in zip(COLOURS, parts.items(), strict=False)
    }
    legend, height = _legend(shown, 22 + BAR + 20)
    return _svg("".join(rows) + legend, height)


def _rect(x: float, y: float, width: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{BAR - 10}" '
        f'fill="{colour}"><title>{escape(title)}</title></rect>'
    )


def _legend(colours: Mapping[str, str], y: int) -> tuple[str, int]:
    """(SVG, the picture's height), three entries a row."""
    rows, step = [], WIDTH // 3
    for i, (name, colour) in enumerate(colours.items()):
        x, top = LEFT + i % 3 * step, y + i // 3 * 22
        rows.append(
            f'<rect x="{x}" y="{top}" width="12" height="12" fill="{colour}"/>'
            f'<text x="{x + 18}" y="{top + 11}">{escape(name)}</text>'
        )
    return "".join(rows), y + -(-len(colours) // 3) * 22 + 6


def _svg(content: str, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="100%" '
        f'role="img" font-family="system-ui, sans-serif" font-size="13" fill="#222">{content}</svg>'
    )
