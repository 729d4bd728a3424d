"""What the commands share: reading flags, `--config` and its overrides, speaking, failing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags
from absl import logging as absl_logging

OVERRIDES: dict[str, str] = {}


def define_config() -> Any:
    """Defines `--config`, for commands that take it and read their flags by `parse_flags`."""
    return flags.DEFINE_string(
        "config", None, "FILE.py[:VARIANT]; --config.a.b=VALUE overrides one of its fields"
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Takes `--config.FIELD=VALUE` (or `--config.FIELD VALUE`) out of argv; absl reads the rest.

    A command without `--config` has no such flags.
    """
    rest, arguments = [argv[0]], iter(argv[1:])
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name.startswith("config.") and "config" in flags.FLAGS:
            OVERRIDES[name.removeprefix("config.")] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    try:
        left: list[str] = flags.FLAGS(rest)
    except RecursionError:  # absl's search for a name like it
        fail(flags.Error("a flag's name is longer than that of any flag."), 2)
    except (flags.Error, OSError, ValueError) as error:  # the latter of a --flagfile
        fail(flags.Error(" ".join(str(error).split())), 2)
    return left


def speak() -> None:
    """Has lmjax say on stderr what it does, and what it warns of; the libraries only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax and jax speak through it, at length
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("lmjax")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def fail(error: Exception, code: int) -> NoReturn:
    """Prints the error's message and exits."""
    print(f"error: {str(error).strip()}", file=sys.stderr)
    sys.exit(code)
