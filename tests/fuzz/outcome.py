"""The property that all of these tests state, and how many examples each of them gets."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from lmjax.errors import UserError

LIMIT_S = 60
LONGEST = 12_000  # characters of a message, which may repeat an input of 5,000


class Hang(BaseException):
    """Raised in the midst of what does not end; no `except Exception` keeps it."""


def outcome(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what `run` returns, None), or (None, its UserError's message), which must be one sentence.

    Every other exception passes through, and fails the test.
    """

    def stop(signum: int, frame: object) -> None:
        raise Hang(f"no end after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        with warnings.catch_warnings():  # of regular expressions and overflows: no errors outside
            for category in (FutureWarning, RuntimeWarning):
                warnings.simplefilter("ignore", category)
            return run(), None
    except UserError as error:
        message = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    check_message(message)
    return None, message


def check_message(message: str) -> None:
    """One line, not empty, not endless, with no trace of Python in it."""
    assert message.strip(), "an empty message"
    assert "\n" not in message.strip() and "Traceback" not in message, message
    assert len(message) < LONGEST, f"{len(message)} characters: {message[:200]}"


def examples(count: int) -> settings:
    """Derandomised; nothing is remembered, and a failure is made small by hand."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def few_and_many(few: int, many: int) -> Callable[[Callable[..., None]], Any]:
    """Runs a test with `few` examples by default and with `many` where slow tests are run."""

    def decorate(test: Callable[..., None]) -> Any:
        return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])(
            test
        )

    return decorate
