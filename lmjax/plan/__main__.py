"""`python -m lmjax.plan --config=configs/gpt2.py --topology=v5p:4x4x4 [--search] [--json=FILE]`.

Exit codes: 0 it fits; 1 an error of lmjax itself; 2 a bad config, file or flag; 4 it does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from lmjax.config import load_config
from lmjax.errors import UserError
from lmjax.flags import OVERRIDES, define_config, fail, parse_flags

CONFIG = define_config()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "chips, as v5e:16x16, v5p:8x8x8, 2*v6e:16x16, h100:64, cpu:8"
)
JSON = flags.DEFINE_string("json", None, "writes the plan to this file")
HTML = flags.DEFINE_string("html", None, "writes a page with pictures to this file")
PRICE = flags.DEFINE_float(
    "price_per_chip_hour", 0.0, "in any currency; the run's price is in the same", lower_bound=0.0
)
SEARCH = flags.DEFINE_bool("search", False, "look over layouts, and compile the best few")
CANDIDATES = flags.DEFINE_integer(
    "search_compiles", 4, "how many that fit to compile", lower_bound=1
)
MEND = flags.DEFINE_bool("mend", True, "where it does not fit, try changes by compiling them")
COMPARE = flags.DEFINE_string("compare", None, "a plan's JSON: print what changed since")
DOES_NOT_FIT = 4


def main(argv: list[str]) -> None:
    """Plans, prints, writes."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    console = Console(highlight=False, soft_wrap=True)
    try:
        fits = _plan(argv, console)
    except (UserError, OSError) as error:
        fail(error, 2)
    sys.exit(0 if fits else DOES_NOT_FIT)


def _plan(argv: list[str], console: Console) -> bool:
    if len(argv) > 1:
        raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
    if not CONFIG.value:
        raise UserError("--config is not given: name a file, as --config=configs/gpt2.py.")
    from lmjax.plan.topology import KNOWN, devices, parse_topology

    if not TOPOLOGY.value:
        raise UserError(f"--topology is not given. Known: {KNOWN}.")
    topology = parse_topology(TOPOLOGY.value)
    other = _read(COMPARE.value) if COMPARE.value else None
    config = load_config(CONFIG.value, OVERRIDES)
    found = devices(topology)
    from lmjax.plan.html import page
    from lmjax.plan.planner import make_plan
    from lmjax.plan.report import compare, print_plan
    from lmjax.plan.search import mend, search

    spec = CONFIG.value

    def load(change: Mapping[str, str]) -> ConfigDict:
        return load_config(spec, {**OVERRIDES, **change})

    plan = make_plan(
        config,
        topology,
        found,
        name=CONFIG.value,
        overrides=OVERRIDES,
        price_per_chip_hour=PRICE.value,
    )
    trials = []
    if SEARCH.value:
        trials = search(
            load, plan.mesh, topology, found, compiles=CANDIDATES.value, say=console.print
        )
    elif not plan.fits and MEND.value:
        trials = mend(load, plan, topology, found, say=console.print)
    plan = dataclasses.replace(plan, trials=trials)
    print_plan(plan, console)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(plan.to_dict(), indent=1) + "\n")
    if HTML.value:
        Path(HTML.value).write_text(page(plan))
    if other is not None:
        _print_changes(compare(json.loads(json.dumps(plan.to_dict())), other), console)
    return plan.fits


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--compare {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"--compare {path} is no JSON: {error}.") from error
    if not isinstance(found, dict) or "memory" not in found:
        raise UserError(f"--compare {path} is no plan: give a file that --json has written.")
    return found


def _print_changes(rows: list[tuple[str, str, str, str]], console: Console) -> None:
    if not rows:
        console.print(f"nothing differs from {COMPARE.value}")
        return
    table = Table(
        "what", "before", "now", "change", title=f"changes since {COMPARE.value}", box=None
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
