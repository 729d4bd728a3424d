"""Tokens to text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmjax.core import Tokenizer
from lmjax.errors import UserError

LOST = "\N{REPLACEMENT CHARACTER}"
# So many tokens before a new one tell how it is spelled: whether a space goes before it, and which
# bytes of a character it completes.
_BEFORE = 64


class TextStream:
    """The text of tokens that come one by one after a prompt, as it becomes certain.

    A character whose bytes are not all there yet waits, and so does text with which a stop string
    may begin. The first stop string and what follows it is no part of the text.

    Args:
      prompt: the tokens before; their own text is not repeated.
      stop: strings that end the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray, *, stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = check_stop(stop)
        self._before = [int(token) for token in prompt[-_BEFORE:]]
        self._before_text = tokenizer.decode(self._before)
        self._fresh: list[int] = []
        self._waiting = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What the text has become longer by, with one more token."""
        if self.stopped:
            return ""
        self._fresh.append(token)
        text = self._tokenizer.decode([*self._before, *self._fresh])
        if text.endswith(LOST) or not text.startswith(self._before_text):
            return ""
        return self._settle(text)

    def end(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        if self._fresh:
            text = self._tokenizer.decode([*self._before, *self._fresh])
            if not text.startswith(self._before_text):  # bytes that complete nothing, after others
                text = self._before_text + self._tokenizer.decode(self._fresh)
            said = self._settle(text)
            if self.stopped:
                return said
        else:
            said = ""
        rest, self._waiting = self._waiting, ""
        self.text += rest
        return said + rest

    def _settle(self, text: str) -> str:
        """Takes in the fresh tokens, whose text with what is before them is `text`."""
        self._waiting += text[len(self._before_text) :]
        self._before = [*self._before, *self._fresh][-_BEFORE:]
        self._before_text = self._tokenizer.decode(self._before)
        self._fresh = []
        found = [i for i in (self._waiting.find(one) for one in self._stop) if i >= 0]
        if found:
            self.stopped = True
            said = self._waiting[: min(found)]
        else:
            said = self._waiting[: len(self._waiting) - self._begun()]
        self._waiting = self._waiting[len(said) :]
        self.text += said
        return said

    def _begun(self) -> int:
        """How long a beginning of a stop string ends what waits."""
        longest = 0
        for one in self._stop:
            for size in range(min(len(one) - 1, len(self._waiting)), longest, -1):
                if self._waiting.endswith(one[:size]):
                    longest = size
                    break
        return longest


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """Several stop strings as a tuple; raises UserError for one alone or an empty one."""
    if isinstance(stop, str):
        raise UserError(f"stop is {stop!r}: give a list of strings, [{stop!r}].")
    if "" in stop:
        raise UserError("stop holds an empty string, which every text begins with: leave it out.")
    return tuple(stop)
