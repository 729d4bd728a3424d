"""`python -m lmjax.data --config=FILE --step=S`: the batch that step S of a run trains on.

Steps count from 1. The batch is found by its number: nothing before it is read, no device is used
and nothing is written but the cache of tokens. With `--workdir`, batches that rollbacks of that run
left out are passed over, as they are by the run.

`python -m lmjax.data --path=OUT`: what the token store OUT holds. Every file is checked against its
sum; counts by source and the beginnings of some documents are printed, and a picture of their
lengths is written beside the store. Exit codes: 0; 2 for a bad config, flag or file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from lmjax.config import build_and_resolve, load_config
from lmjax.data.describe import describe, spell
from lmjax.data.store import Store, verify_preparation
from lmjax.data.survey import draw_lengths, find_stores, picture_path, spell_survey, survey
from lmjax.engine.incidents import batch_of, batches_left_out
from lmjax.errors import Exit, UserError
from lmjax.flags import OVERRIDES, define_config, fail, parse_flags

CONFIG = define_config()
STEP = flags.DEFINE_integer("step", None, "which step's batch, from 1", 1, 2**40)
BATCH = flags.DEFINE_integer("batch", None, "or which batch, from 0", 0, 2**40)
ROWS = flags.DEFINE_integer("rows", None, "how many rows to show; all if not given", lower_bound=1)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "a run of this config: its rollbacks' batches are left out of the steps'"
)
STORE = flags.DEFINE_string("path", None, "a token store, or what `python -m lmjax.prepare` wrote")
JSON = flags.DEFINE_bool("json", False, "print one JSON object, with every array of the batch")


def main(argv: list[str]) -> None:
    """Prints the batch."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        if STORE.value:
            tell_store(STORE.value)
            return
        if not CONFIG.value:
            raise UserError(
                "--config is not given: name a file, as --config=configs/char.py, or a token store "
                "by --path."
            )
        if (STEP.value is None) == (BATCH.value is None):
            raise UserError("give --step (from 1) or --batch (from 0), one of the two.")
        run, _ = build_and_resolve(load_config(CONFIG.value, OVERRIDES))
        batch_size, seed = run.batch_size, run.seed
        found = describe(
            run.data, _number(run.steps), batch_size=batch_size, seed=seed, rows=ROWS.value
        )
        found = {"step": STEP.value, **found}
        if JSON.value:
            print(json.dumps(found))
        else:
            for line in spell(found):
                print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        fail(error, Exit.USAGE)


def tell_store(path: str) -> None:
    """Prints what the splits of a store hold; raises UserError where one is damaged."""
    if CONFIG.value or STEP.value is not None or BATCH.value is not None:
        raise UserError("--path shows a token store: give it without --config, --step and --batch.")
    folders = find_stores(path)
    damaged = list(verify_preparation(path, folders))
    for text in damaged:
        print(f"damaged: {text}", file=sys.stderr)
    for folder in folders:
        store = Store(folder)
        found = survey(store, samples=3 if ROWS.value is None else ROWS.value)
        damaged += found["damaged"]
        if not found["damaged"]:
            found["picture"] = str(picture_path(store))
            draw_lengths(found, found["picture"])
        for line in [json.dumps(found)] if JSON.value else spell_survey(found):
            print(line)
        if not JSON.value and not found["damaged"]:
            print(f"  picture: {found['picture']}")
    sys.stdout.flush()
    if damaged:
        raise UserError(f"{path}: {len(damaged)} damaged files; {damaged[0]}")


def _number(steps: int) -> int:
    """Which batch the flags ask for, of a run of so many steps."""
    if STEP.value is None:
        assert BATCH.value is not None
        return BATCH.value
    if WORKDIR.value and not Path(WORKDIR.value).is_dir():
        raise UserError(f"--workdir: there is no folder {WORKDIR.value!r}. Name a run's, or none.")
    left_out = batches_left_out(WORKDIR.value) if WORKDIR.value else ()
    number = batch_of(STEP.value, left_out)
    if STEP.value > steps:
        raise UserError(
            f"--step is {STEP.value}, past the run's {steps} steps; --batch={number} shows the "
            "batch that would follow."
        )
    return number


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
