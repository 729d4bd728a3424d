"""What the commands that read a config share: `--config`, its overrides, and how they fail."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

CONFIG = flags.DEFINE_string(
    "config", None, "FILE.py[:VARIANT]; --config.a.b=VALUE overrides one of its fields"
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
    except RecursionError:  # absl's search for a name like it
        fail(flags.Error("a flag's name is longer than that of any flag."), 2)
    except (flags.Error, OSError, ValueError) as error:  # the latter of a --flagfile
        fail(error, 2)
    return left


def fail(error: Exception, code: int) -> NoReturn:
    """Prints the error's message and exits."""
    print(f"error: {str(error).strip()}", file=sys.stderr)
    sys.exit(code)
