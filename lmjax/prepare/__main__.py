"""`python -m lmjax.prepare --config=configs/prepare/web.py --workdir=OUT [--runner=ray]`.

Reads, cleans, deduplicates, splits and tokenises as the config says. Run again, it goes on where it
was stopped, and does what changed in config, code or input. `OUT/report.md` tells what became of
every record. Exit codes: 0 done; 1 an error of lmjax itself, or of the machine; 2 a bad config,
flag or file; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from absl import app, flags

from lmjax.config import build_and_resolve, explain, load_config
from lmjax.data.folder import Folder
from lmjax.errors import Exit, UserError
from lmjax.flags import OVERRIDES, define_config, fail, parse_flags, speak

try:
    from lmjax.prepare.backends import RUNNERS, backend
    from lmjax.prepare.pipeline import Prepare, run
except ModuleNotFoundError as missing:  # pyarrow, orjson
    fail(UserError(f"preparing needs `pip install 'lmjax[prepare]'`: {missing}."), Exit.USAGE)

CONFIG = define_config()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "where results lie, a folder or s3://bucket/folder; what is done is kept"
)
RUNNER = flags.DEFINE_enum("runner", "native", RUNNERS, "what runs the tasks")
WORKERS = flags.DEFINE_integer("workers", 0, "how many tasks at once; 0: one a core", 0, 1 << 20)
RAY_ADDRESS = flags.DEFINE_string(
    "ray_address", "", "of a Ray cluster; one of its own if not given"
)
PRUNE = flags.DEFINE_bool(
    "prune", False, "at the end remove the stages of earlier configs, which are kept for reuse"
)
EXPLAIN = flags.DEFINE_bool("explain", False, "print every value and where it comes from, and stop")


def main(argv: list[str]) -> None:
    """Builds the preparation from config and flags, and runs it."""
    speak()
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        if not CONFIG.value:
            raise UserError(
                "--config is not given: name a file, as --config=configs/prepare/web.py."
            )
        config = load_config(CONFIG.value, OVERRIDES)
        prepare, tree = build_and_resolve(config)
        if EXPLAIN.value:
            for field, value, source in explain(config):
                print(f"{field} = {value!r}  ({source})")
            return
        if not isinstance(prepare, Prepare):
            raise UserError(f"{CONFIG.value}: get_config() must return call(Prepare, ...).")
        if not WORKDIR.value:
            raise UserError("--workdir is not given: name a folder for the results.")
        if WORKDIR.value.startswith("hf://"):  # each file would be a commit
            raise UserError(
                f"--workdir is {WORKDIR.value!r}: Hugging Face is read, not written. Give a "
                "folder, s3://bucket/folder or gs://bucket/folder."
            )
        out = Folder(WORKDIR.value)
        if not out.is_remote:
            out = Folder(os.path.abspath(os.path.expanduser(WORKDIR.value)))
        engine = backend(
            RUNNER.value,
            workdir=out.path,
            workers=WORKERS.value,
            address=RAY_ADDRESS.value,
        )
        run(prepare, out.path, engine=engine, config=tree, prune=PRUNE.value)
        report = out.read("report.md").decode()
    except UserError as error:
        fail(error, Exit.USAGE)
    except KeyboardInterrupt:
        fail(RuntimeError("stopped; the same command goes on from here."), Exit.INTERRUPTED)
    except (OSError, RuntimeError) as error:
        fail(error, Exit.ERROR)
    print(report.rstrip())
    sys.stdout.flush()


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
