"""A trained model with its tokenizer, as notebooks and the command line use it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.annotations import shown
from lmjax.config import build
from lmjax.core import Decoder, EncoderDecoder, Variables
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import TextTokenizer, tokenizer_from_json
from lmjax.engine.checkpoint import Checkpoints
from lmjax.errors import UserError
from lmjax.generate.averaged import averaged_checkpoints
from lmjax.generate.beam import BeamSearch
from lmjax.generate.decode import Decoding
from lmjax.generate.sample import Settings
from lmjax.generate.text import TextStream
from lmjax.generate.weights import (
    FEW_ROWS,
    Weights,
    apart,
    in_dtype,
    in_float32,
    product_dtype,
)
from lmjax.models.saved import recorded_model
from lmjax.ops.losses import logits

# A text, or a conversation: messages with "role" and "content", for the tokenizer's chat template.
Prompt = str | Sequence[Mapping[str, Any]]
# What a call draws with where it does not say otherwise.
DEFAULTS: Settings = {"temperature": 0.8, "top_k": 50}


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A decoder with its parameters and its tokenizer.

    Or an encoder-decoder: its prompts are sources, and their continuations what it makes of them.
    Of a conversation the continuation is the assistant's answer.

    Args:
      more_ends: ids that end a text beside the tokenizer's `end_id`.
    """

    model: Decoder | EncoderDecoder
    variables: Variables
    tokenizer: TextTokenizer
    decoding: Decoding
    step: int
    more_ends: tuple[int, ...] = ()

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 200,
        seed: int = 0,
        stop: Sequence[str] = (),
        **settings: Unpack[Settings],
    ) -> str:
        """The prompt's continuation; see `stream`."""
        return "".join(self.stream(prompt, max_tokens=max_tokens, seed=seed, stop=stop, **settings))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 200,
        seed: int = 0,
        stop: Sequence[str] = (),
        **settings: Unpack[Settings],
    ) -> Iterator[str]:
        """Yields the continuation piece by piece.

        It ends after `max_tokens`, with the document, or before the first of the stop strings.

        Args:
          seed: the same seed gives the same text, whatever it is generated beside.
          settings: temperature (0.8), top_k (50), top_p, min_p, repetition_penalty, see
            `sample.Sampling`.
        """
        ids = self.encode(prompt)
        text = TextStream(self.tokenizer, self._before(ids), stop=stop)
        drawing: Settings = {**DEFAULTS, **settings}
        tokens = self.decoding.tokens(
            self.weights(1),
            ids,
            max_tokens=max_tokens,
            seed=seed,
            end_ids=self.end_ids,
            **drawing,
        )
        for token in tokens:
            if piece := text.push(token):
                yield piece
            if text.stopped:
                return
        if piece := text.end():
            yield piece

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 200,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        **settings: Unpack[Settings],
    ) -> list[str]:
        """The continuation of each prompt, decoded together: the text that it would have alone.

        Args:
          seed: one for all prompts, or one for each.
          stop, settings: see `stream`.
        """
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each.")
        ids = [self.encode(prompt) for prompt in prompts]
        texts = [TextStream(self.tokenizer, self._before(one), stop=stop) for one in ids]
        done: set[int] = set()
        drawing: Settings = {**DEFAULTS, **settings}
        for row, token in self.decoding.batch(
            self.weights(self.decoding.rows(len(prompts))),
            ids,
            max_tokens=max_tokens,
            seeds=seeds,
            end_ids=self.end_ids,
            done=done,
            **drawing,
        ):
            texts[row].push(token)
            if texts[row].stopped:
                done.add(row)
        for text in texts:
            text.end()
        return [text.text for text in texts]

    def search(
        self,
        prompt: Prompt,
        *,
        num_beams: int = 4,
        max_tokens: int = 200,
        length_penalty: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[tuple[str, float]]:
        """Likely continuations found by beam search with their scores, best first.

        See `beam.BeamSearch`; a stop string ends a text as the document's end does.
        """
        ids = self.encode(prompt)

        def read(tokens: Sequence[int]) -> TextStream:
            text = TextStream(self.tokenizer, self._before(ids), stop=stop)
            for token in tokens:
                text.push(token)
            return text

        found = self._beam_search.search(
            self.weights(num_beams),
            ids,
            num_beams=num_beams,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            end_ids=self.end_ids,
            ended=(lambda tokens: read(tokens).stopped) if stop else None,
        )
        texts = [read(one.tokens) for one in found]
        for text in texts:
            text.end()
        return [(text.text, one.score) for text, one in zip(texts, found, strict=True)]

    def logits(self, text: str) -> jax.Array:
        """The logits after each token of a prompt, [T, V]; row t is of the token after token t."""
        return self._logits(self.variables, jnp.asarray(self.encode(text))[None])[0]

    @functools.cached_property
    def _logits(self) -> Callable[[Variables, jax.Array], jax.Array]:
        decoder = self.decoder

        @jax.jit
        def run(variables: Variables, tokens_1T: jax.Array) -> jax.Array:
            output = decoder.apply(variables, tokens_1T)
            return logits(output.hidden_BTD, output.unembedding)

        return run

    @property
    def decoder(self) -> Decoder:
        """The model; raises UserError where it is an encoder-decoder, which continues no text."""
        if isinstance(self.model, EncoderDecoder):
            raise UserError(
                "the model is an encoder-decoder, which writes a text of a source: what is asked "
                "for is of a text alone. Take a decoder."
            )
        return self.model

    @property
    def reads_source(self) -> bool:
        """Whether what it makes of a prompt is a text of its own, not the rest of one."""
        return self.decoding.reads_source

    def _before(self, ids: np.ndarray) -> np.ndarray:
        """What of a prompt stands before the text that is generated."""
        return ids[:0] if self.reads_source else ids

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a text."""
        return frozenset((self.tokenizer.end_id, *self.more_ends))

    def encode(self, prompt: Prompt) -> np.ndarray:
        """A prompt's ids as the model reads them: with bos, and a conversation by its template.

        Raises UserError for a conversation where the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(prompt)
        if not isinstance(self.tokenizer, SubwordTokenizer):
            raise UserError(
                "the prompt is a conversation, and the run's tokenizer, of bytes or characters, "
                "has no chat template: give a text."
            )
        return self.tokenizer.encode_chat(prompt, add_generation_prompt=True).ids

    def weights(self, rows: int) -> Weights:
        """The weights as a step of so many rows reads them fastest."""
        on_cpu = jax.default_backend() == "cpu"
        return self._wide if on_cpu and rows < FEW_ROWS else self._narrow

    @functools.cached_property
    def _wide(self) -> Weights:
        return _ready(in_float32(self.variables))

    @functools.cached_property
    def _narrow(self) -> Weights:
        return _ready(in_dtype(self.variables, product_dtype(self.model)))

    @functools.cached_property
    def _beam_search(self) -> BeamSearch:
        return BeamSearch(self.decoding)


def _ready(variables: Variables) -> Weights:
    return Weights(variables, apart(variables) if jax.default_backend() == "cpu" else None)


def load(workdir: str | Path, *, step: int | None = None, average: int = 1) -> LanguageModel:
    """Reads a run's newest checkpoint (or that of `step`); needs neither its data nor its mesh.

    Args:
      average: take the mean of the parameters of so many newest checkpoints up to that step
        (Vaswani et al., arXiv:1706.03762, section 6.1); the run must keep them, see
        `Run.keep_last`.

    Raises UserError where the folder holds no run, or not as many checkpoints of a language model.
    """
    config = Path(workdir) / "config.json"
    recorded = recorded_model(workdir)
    try:
        model = build(recorded)
    except UserError as error:
        raise UserError(f"task.model of {config} is damaged: {error}") from error
    if hasattr(model, "apply") and not hasattr(model, "init_cache"):
        raise UserError(
            f"task.model of {config} is a {type(model).__name__}, which writes no text: "
            "lmjax.evaluate.embeddings.load reads encoders."
        )
    if not hasattr(model, "init_cache"):
        raise UserError(f"task.model of {config} is damaged: it gives {shown(model)}.")
    checkpoints = Checkpoints(Path(workdir) / "checkpoints")
    step, variables, about = averaged_checkpoints(checkpoints, step, average)
    checkpoints.close()
    return LanguageModel(
        model=model,
        variables=jax.device_put(variables),
        tokenizer=tokenizer_from_json(about["tokenizer"]),
        decoding=Decoding(model),
        step=step,
        more_ends=_published_ends(Path(workdir) / "huggingface"),
    )


def _published_ends(folder: Path) -> tuple[int, ...]:
    """The eos_token_id, one or several, that weights were published with, if the run was imported.

    generation_config.json goes before config.json, as in `transformers`.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            held = json.loads((folder / name).read_text("utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder / name} cannot be read ({error}): import again.") from error
        found = held if isinstance(held, list) else [held]
        if ends := tuple(one for one in found if type(one) is int):
            return ends
    return ()
