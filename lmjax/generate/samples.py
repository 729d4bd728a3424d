"""Text sampled during a run, so that a person can read how far it has come."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from lmjax.core import Dataset, Decoder, Session, Task
from lmjax.errors import UserError
from lmjax.generate.decode import Decoding


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One continuation of a prompt by the task's model, the same seed each time.

    Args:
      prompt: may not be empty, and must be spelled in the data's vocabulary.
      max_tokens: how long a continuation is.
    """

    model: Decoder
    prompt: str
    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt or self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise UserError(
                f"prompt is {self.prompt!r}, max_tokens {self.max_tokens}, temperature "
                f"{self.temperature} and top_k {self.top_k}: give some text, at least 1, and no "
                "negative numbers."
            )

    def check(self, task: Task, data: Dataset) -> None:
        """The prompt must be spelled in the data's vocabulary."""
        del task
        data.tokenizer.encode(self.prompt)

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """The prompt with its continuation, as `text`."""
        tokenizer = session.data.tokenizer
        prompt = tokenizer.encode(self.prompt)
        tokens = self._decoding.tokens(
            session.variables(),
            prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
        )
        return {"text": tokenizer.decode([*prompt, *tokens])}

    @functools.cached_property
    def _decoding(self) -> Decoding:
        return Decoding(self.model)
