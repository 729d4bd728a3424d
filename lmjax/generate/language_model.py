"""A trained model with its tokenizer, as notebooks and the command line use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from lmjax.annotations import shown
from lmjax.config import build, from_dict
from lmjax.core import Decoder, Tokenizer, Variables
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.engine.checkpoint import Checkpoints
from lmjax.errors import UserError
from lmjax.generate.decode import Decoding
from lmjax.ops.losses import logits


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A decoder with its parameters and its tokenizer."""

    model: Decoder
    variables: Variables
    tokenizer: Tokenizer
    decoding: Decoding
    step: int

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        seed: int = 0,
    ) -> str:
        """The prompt's continuation; see `stream`."""
        return "".join(
            self.stream(
                prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
            )
        )

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yields the continuation piece by piece, until `max_tokens` or the end of a document.

        Args:
          temperature: 0 always takes the likeliest token.
          top_k: only so many of the likeliest tokens are drawn from; 0 for all.
        """
        tokens = self.decoding.tokens(
            self.variables,
            self.tokenizer.encode(prompt),
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            end_id=getattr(self.tokenizer, "end_id", None),
        )
        said, ids = "", []
        for token in tokens:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[len(said) :]
                said = text
        if ids and (text := self.tokenizer.decode(ids)) != said:
            yield text[len(said) :]

    def logits(self, text: str) -> jax.Array:
        """The logits after each token of a text, [T, V]; row t is of the token after token t."""
        tokens_1T = jnp.asarray(self.tokenizer.encode(text))[None]
        output = self.model.apply(self.variables, tokens_1T)
        return logits(output.hidden_BTD, output.unembedding)[0]


def load(workdir: str | Path, *, step: int | None = None) -> LanguageModel:
    """Reads a run's newest checkpoint (or that of `step`); needs neither its data nor its mesh.

    Raises UserError where the folder holds no run, or no checkpoint of a language model.
    """
    config = Path(workdir) / "config.json"
    if not config.exists():
        raise UserError(f"{workdir} holds no run: there is no {config}.")
    try:
        node = json.loads(config.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{config} cannot be read ({error}): it is damaged. The checkpoints hold copies of it."
        ) from error
    for name in ("task", "model"):
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(
            f"{config} has no task.model: it was not trained from a config of a language model."
        )
    try:
        model = build(from_dict(node))
    except UserError as error:
        raise UserError(f"task.model of {config} is damaged: {error}") from error
    if not hasattr(model, "init_cache"):
        raise UserError(f"task.model of {config} is damaged: it gives {shown(model)}.")
    checkpoints = Checkpoints(Path(workdir) / "checkpoints")
    step, variables, about = checkpoints.restore_for_inference(step)
    checkpoints.close()
    return LanguageModel(
        model=model,
        variables=jax.device_put(variables),
        tokenizer=tokenizer_from_json(about["tokenizer"]),
        decoding=Decoding(model),
        step=step,
    )
