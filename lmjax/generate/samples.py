"""Text sampled during a run, so that a person can read how far it has come."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from lmjax.core import Decoder, Session, Task, TextDataset
from lmjax.errors import UserError
from lmjax.generate.decode import Decoding
from lmjax.generate.sample import Sampling, check_run

NUM_PROMPT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One continuation of a prompt by the task's model, the same seed each time.

    Args:
      prompt: must be spelled in the data's vocabulary; "" takes the first tokens of the data.
      max_tokens: how long a continuation is.
    """

    model: Decoder
    prompt: str
    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}: give at least 1.")
        check_run(max_tokens=self.max_tokens, seeds=self.seed)
        Sampling(temperature=self.temperature, top_k=self.top_k)

    def check(self, task: Task, data: TextDataset, *, ways: int) -> None:
        """The prompt must be spelled in the data's vocabulary."""
        del task, ways
        try:
            data.tokenizer.encode(self.prompt)
        except UserError as error:
            raise UserError(
                f"the sample's prompt {self.prompt!r} cannot be spelled: {error} Set its `prompt` "
                "to text that the corpus holds, or to nothing."
            ) from error

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """The prompt with its continuation, as `text`."""
        data = cast(TextDataset, session.data)  # as `check` saw
        tokenizer = data.tokenizer
        prompt = tokenizer.encode(self.prompt) if self.prompt else _first_tokens(data)
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


def _first_tokens(data: TextDataset) -> np.ndarray:
    """The beginning of the first example."""
    batches = data.batches(batch_size=1, seed=0)
    return np.asarray(next(batches)["tokens"][0, :NUM_PROMPT_TOKENS])
