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
    except flags.Error as error:
        fail(error, 2)
    return left


def fail(error: Exception, code: int) -> NoReturn:
    """Prints the error in one line and exits."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
