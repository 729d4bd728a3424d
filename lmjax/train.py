"""`python -m lmjax.train --config=configs/shakespeare.py --workdir=DIR [--config.steps=500]`.

Exit codes: 0 done; 1 an error of lmjax itself; 2 a bad config, file or flag; 3 the loss is not
finite; 130 and 143 stopped by Ctrl-C and SIGTERM, saved.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from lmjax.config import build_and_resolve, explain, load_config
from lmjax.errors import UserError
from lmjax.hardware import prepare_cpu

CONFIG = flags.DEFINE_string(
    "config", None, "FILE.py[:VARIANT]; --config.a.b=VALUE overrides one of its fields"
)
WORKDIR = flags.DEFINE_string("workdir", None, "where the run lies; an existing one is continued")
EXPLAIN = flags.DEFINE_bool("explain", False, "print every value and where it comes from, and stop")
DEVICES = flags.DEFINE_integer(
    "devices", 0, "how many devices the CPU shows as; 0 for one", lower_bound=0
)

OVERRIDES: dict[str, str] = {}


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Takes `--config.FIELD=VALUE` (or `--config.FIELD VALUE`) out of argv; absl reads the rest."""
    rest, arguments = [argv[0]], iter(argv[1:])
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name.startswith("config."):
            OVERRIDES[name.removeprefix("config.")] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    try:
        left: list[str] = flags.FLAGS(rest)
    except flags.Error as error:
        _fail(error, 2)
    return left


def main(argv: list[str]) -> None:
    """Builds the run from config and flags, and trains it."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax and jax speak through it, at length
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("lmjax")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        if not CONFIG.value:
            raise UserError("--config is not given: name a file, as --config=configs/char.py.")
        config = load_config(CONFIG.value, OVERRIDES)
        run, tree = build_and_resolve(config)
        if EXPLAIN.value:
            for field, value, source in explain(config):
                print(f"{field} = {value!r}  ({source})")
            return
        if not WORKDIR.value:
            raise UserError("--workdir is not given: name a folder for the run.")
    except (UserError, OSError) as error:
        _fail(error, 2)
    _prepare_jax()
    from lmjax.engine.loop import Interrupted, NonFinite, train

    try:
        train(run, WORKDIR.value, config=tree)
    except NonFinite as error:
        _fail(error, 3)
    except UserError as error:
        _fail(error, 2)
    except OSError as error:  # a full or read-only disk
        _fail(error, 1)
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        _fail(RuntimeError("stopped at once; what was saved before is untouched."), 130)
    except Interrupted as stop:
        print(f"{stop}. To continue: {sys.executable} -m lmjax.train {shlex.join(sys.argv[1:])}")
        sys.exit(stop.exit_code)


def _prepare_jax() -> None:
    """Settings that must stand before jax meets a device."""
    import jax

    prepare_cpu()
    if DEVICES.value:
        jax.config.update("jax_num_cpu_devices", DEVICES.value)
    cache = Path(os.environ.get("LMJAX_CACHE", "~/.cache/lmjax")).expanduser() / "xla"
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
