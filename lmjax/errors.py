"""The one exception class for mistakes that the person at the keyboard can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A bad config, file or flag: says what was given, what is allowed, and the fix.

    Entry points print its message without a traceback and exit with code 2.
    """


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean 'x'? Allowed: a, b, x.' for a misspelt name."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Allowed: {', '.join(allowed) or 'none'}."
