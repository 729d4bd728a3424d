"""Runs the launcher's command line for each list of arguments on stdin; one process for all."""

import contextlib
import io
import json
import sys

from absl import flags

import lmjax.train
from lmjax.flags import OVERRIDES, parse_flags


def run(arguments):
    """[exit code, what went to stderr] of `lmjax.train`, which explains and does not train."""
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS.flags_by_module_dict()["lmjax.train"]:
        name.value = name.default
        name.present = 0
    flags.FLAGS["config"].value = None
    OVERRIDES.clear()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            lmjax.train.main(parse_flags(["train", *arguments, "--explain=true"]))
            code = 0
        except SystemExit as stop:
            code = stop.code
    return [code, said.getvalue()]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
