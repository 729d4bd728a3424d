"""The exception for mistakes that the person at the keyboard can mend, and the exit codes."""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterable


class Exit(enum.IntEnum):
    """How a command ended, for supervisors: AGAIN asks for the same command once more."""

    DONE = 0
    ERROR = 1  # of lmjax itself, or of the machine
    USAGE = 2  # a bad config, file or flag
    NOT_FINITE = 3  # the loss or the gradient
    CORRUPT = 4  # replicas of a parameter differ: a device computes wrongly
    AGAIN = 75  # another process was lost, or nothing moved for too long
    INTERRUPTED = 130  # Ctrl-C, saved
    TERMINATED = 143  # SIGTERM, saved


class UserError(ValueError):
    """A bad config, file or flag: says what was given, what is allowed, and the fix.

    Entry points print its message without a traceback and exit with `code`.
    """

    code = Exit.USAGE


def check_regex(name: str, pattern: str) -> None:
    """Raises UserError where the pattern of this name is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{name}: {pattern!r} is no regular expression: {error}.") from error


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean 'x'? Allowed: a, b, x.' for a misspelt name."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Allowed: {', '.join(allowed) or 'none'}."
