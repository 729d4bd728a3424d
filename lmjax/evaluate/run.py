"""`python -m lmjax.evaluate.run --workdir=DIR [--step=N] [--out=FILE.json]`: its evals once more.

Runs the evaluators that a run's config names (losses, classification, translation, samples, ...) on
one of its checkpoints, prints what they find and writes their pictures: beside --out, or into the
run's folder. It is for every task, as all that it needs is in the folder: config.json names the
model, the data and `evals`; without any the loss on the validation split is taken.

What `python -m lmjax.convert` wrote knows neither data nor evals: --config names a run's folder, or
FILE.py[:VARIANT], whose data and evals are taken (python -m lmjax.evaluate.run --workdir=MERGED
--config=RUN). --config.data.path=PATH, --config.evals.valid.max_batches=0 and so on override them.

Exit codes: 0; 1 where a file cannot be written; 2 for a bad folder, flag, config or data.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from lmjax.errors import Exit, UserError
from lmjax.flags import OVERRIDES, define_config, fail, parse_flags, speak
from lmjax.hardware import prepare

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run", required=True)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest if not given")
EVALS = flags.DEFINE_list("evals", [], "which of the evaluators, by name; all if not given")
OUT = flags.DEFINE_string("out", None, "write the results to this file, as JSON")


def main(argv: list[str]) -> None:
    """Evaluates, writes --out and prints a table, then samples."""
    speak()
    prepare()
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        _evaluate()
    except UserError as error:
        fail(error, error.code)
    except OSError as error:
        fail(error, Exit.ERROR)


def _evaluate() -> None:
    from rich.console import Console

    from lmjax.evaluate.recorded import evaluate, recorded
    from lmjax.evaluate.report import check_out, finite, record, show, write

    if OUT.value:
        check_out(OUT.value)
    workdir = Path(WORKDIR.value).expanduser()
    run = recorded(workdir, config=CONFIG.value or "", overrides=OVERRIDES)
    folder = Path(OUT.value).parent if OUT.value else workdir
    found, step = evaluate(run, workdir, folder=folder, step=STEP.value, only=EVALS.value)
    data: Any = run.data
    about = record(
        workdir,
        step,
        tokenizer=data.tokenizer.hash if "tokenizer" in data.fitted else None,
        settings={"config": CONFIG.value, "overrides": dict(OVERRIDES), "evals": list(found)},
        results=finite(found),
    )
    if OUT.value:
        write(OUT.value, about)
    width = None if sys.stdout.isatty() else 160
    console = Console(highlight=False, markup=False, width=width)
    console.print(f"{WORKDIR.value}, step {step}, checkpoint {about['checkpoint'][:12]}")
    show(finite(found), console)
    for name, numbers in found.items():
        for what, text in numbers.items():
            if isinstance(text, str):
                console.print(f"\n{name}/{what}:\n{text}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
