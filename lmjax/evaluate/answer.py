"""The three kinds of requests of lm-evaluation-harness, answered in batches.

Source: `HFLM` and `TemplateLM` of lm-evaluation-harness 0.4.13, whose conventions decide which
tokens are scored: published scores are made by them. Here they take plain texts, so that nothing of
the harness is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

from lmjax.errors import UserError, did_you_mean
from lmjax.evaluate.perplexity import bos_id, start_ids, windows
from lmjax.evaluate.score import Scorer, Span
from lmjax.generate.language_model import LanguageModel
from lmjax.generate.sample import Settings
from lmjax.generate.text import TextStream

MAX_GEN_TOKS = 256  # where a request does not say
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a text goes on: until a stop string, so many tokens at most, drawn so."""

    until: tuple[str, ...]
    max_tokens: int
    drawing: Settings

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Generation:
        """Reads the `generation_kwargs` of a task; raises UserError for one that is not known.

        Without `do_sample`, or with a temperature of 0, the likeliest token is taken. A temperature
        alone turns sampling on.
        """
        known = ("until", "do_sample", "num_beams", *_LIMITS, *_DRAWING)
        given = {name: value for name, value in kwargs.items() if value is not None}
        for name in given:
            if name not in known:
                raise UserError(
                    f"generation_kwargs has {name!r}, which lmjax does not know."
                    + did_you_mean(name, known)
                )
        if given.get("num_beams", 1) != 1:
            raise UserError(
                f"generation_kwargs has num_beams {given['num_beams']}: lmjax answers a harness's "
                "requests without beams. Leave it out."
            )
        until = given.get("until", ())
        texts = [until] if isinstance(until, str) else list(until)
        sampled = given.get("do_sample", float(given.get("temperature", 0)) > 0)
        drawing: dict[str, Any] = {name: given[name] for name in _DRAWING if name in given}
        drawing["temperature"] = float(drawing.get("temperature", 1)) if sampled else 0.0
        limits = [int(given[name]) for name in _LIMITS if name in given]
        return cls(
            until=tuple(text for text in texts if text),
            max_tokens=limits[0] if limits else MAX_GEN_TOKS,
            drawing=cast(Settings, drawing),
        )


class Answering:
    """Answers requests with one model.

    Args:
      lm: the model and its tokenizer.
      batch_size: requests read together.
      length: the longest context that is used; 0 for the model's.
      seed: of texts that are drawn; each request has a seed of its own, from this one on.
      devices: what scores; generation is on the default device. By default all.
      progress: is told (what is done, requests done since, requests in all).
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        batch_size: int = 8,
        length: int = 0,
        seed: int = 0,
        devices: Sequence[jax.Device] | None = None,
        progress: Progress | None = None,
    ) -> None:
        longest = lm.decoder.max_length
        if not 0 <= length <= longest:
            raise UserError(f"length is {length}: give 1 to {longest}, or 0 for the longest.")
        self.lm = lm
        self.batch_size = batch_size
        self.max_length = length or longest
        self.seed = seed
        self.prefix_id = bos_id(lm.tokenizer)
        self._start = start_ids(lm.tokenizer)
        self._scorer = Scorer(lm.decoder, lm.variables, batch_size=batch_size, devices=devices)
        self._progress = progress or (lambda *_: None)

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-likelihood, and is it greedy.

        An empty context is the bos token, or that which ends documents. What is longer than the
        model's context loses its beginning. Raises UserError for a continuation without a token, or
        one that is itself longer than the context.
        """
        spans = [self._span(number, *request) for number, request in enumerate(requests)]
        report = self._report("log-likelihoods", len(spans))
        scored = self._scorer.score(spans, progress=report)
        return [(_sum(s.logprobs), bool(s.likeliest.all())) for s in scored]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text, all of its tokens scored in disjoint windows."""
        spans: list[Span] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            ids = np.concatenate([[self.prefix_id], self._encode(owner, text)]).astype(np.int32)
            cuts = windows(len(ids), length=self.max_length, stride=self.max_length)
            for first, last, scored in cuts:
                spans.append(Span(ids[first:last], scored))
                owners.append(owner)
        report = self._report("windows", len(spans))
        totals = [0.0] * len(texts)
        found = self._scorer.score(spans, progress=report)
        for owner, s in zip(owners, found, strict=True):
            totals[owner] += _sum(s.logprobs)
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The continuation of each (context, generation_kwargs), up to its first stop string.

        It ends with the document too. See `Generation.of`; a context that leaves no room for all of
        the tokens loses its beginning.
        """
        contexts: list[np.ndarray] = []
        groups: dict[str, tuple[Generation, list[int]]] = {}
        for number, (context, kwargs) in enumerate(requests):
            how = Generation.of(kwargs)
            room = self.max_length - how.max_tokens
            if how.max_tokens < 0 or room < 1:
                raise UserError(
                    f"a request asks for {how.max_tokens} tokens, and the context of "
                    f"{self.max_length} has to hold at least one before them. Set max_gen_toks in "
                    "generation_kwargs of the task to less."
                )
            ids = self._encode(number, context)[-room:]
            contexts.append(ids if len(ids) else np.array([self.prefix_id], np.int32))
            key = json.dumps([how.until, how.max_tokens, how.drawing], sort_keys=True)
            groups.setdefault(key, (how, []))[1].append(number)
        report = self._report("texts", len(requests))
        texts = [""] * len(requests)
        for how, numbers in groups.values():
            numbers.sort(key=lambda number: -len(contexts[number]))
            for at in range(0, len(numbers), self.batch_size):
                some = numbers[at : at + self.batch_size]
                found = self._go_on([contexts[n] for n in some], how, [self.seed + n for n in some])
                for number, text in zip(some, found, strict=True):
                    texts[number] = text
                report(len(some))
        return texts

    def encode(self, text: str) -> np.ndarray:
        """Ids as the model reads a text: with bos where its files say so, but never two of them."""
        ids = np.asarray(self.lm.tokenizer.encode_prompt(text), np.int32)
        return ids[1:] if len(self._start) and list(ids[:2]) == [self.prefix_id] * 2 else ids

    def encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of both, cut where the context's own tokens end.

        Spaces that end the context are the continuation's: tokens of words begin with theirs.
        """
        if not context:
            ids = self.encode(continuation)
            size = len(self._start)
            ids = ids[size:] if size and list(ids[:size]) == list(self._start) else ids
            if list(ids[:1]) == [self.prefix_id]:
                return ids[:1], ids[1:]
            return np.array([self.prefix_id], np.int32), ids
        kept = context.rstrip()
        whole = self.encode(context + continuation)
        ids = self.encode(kept)
        return ids, whole[len(ids) :]

    def _span(self, number: int, context: str, continuation: str) -> Span:
        try:
            before, ids = self.encode_pair(context, continuation)
        except UserError as error:
            raise _unspelled(number, context + continuation, error) from error
        if not len(before):  # a context of spaces alone
            before = np.array([self.prefix_id], np.int32)
        if not 0 < len(ids) <= self.max_length:
            raise UserError(
                f"the continuation {continuation[:40]!r} of {context[-40:]!r} has {len(ids)} "
                f"tokens: it must have 1 to {self.max_length}, the longest context. Mend the task."
            )
        return Span(np.concatenate([before, ids])[-(self.max_length + 1) :], len(ids))

    def _encode(self, number: int, text: str) -> np.ndarray:
        try:
            return self.encode(text)
        except UserError as error:
            raise _unspelled(number, text, error) from error

    def _go_on(
        self, contexts: Sequence[np.ndarray], how: Generation, seeds: Sequence[int]
    ) -> list[str]:
        """The continuations of some contexts, decoded together."""
        tokenizer = self.lm.tokenizer
        streams = [TextStream(tokenizer, ids, stop=how.until) for ids in contexts]
        tokens: list[list[int]] = [[] for _ in contexts]
        done: set[int] = set()
        for row, token in self.lm.decoding.batch(
            self.lm.weights(self.lm.decoding.rows(len(contexts))),
            contexts,
            max_tokens=how.max_tokens,
            seeds=[seed % 2**32 for seed in seeds],
            end_ids=self.lm.end_ids,
            done=done,
            **how.drawing,
        ):
            tokens[row].append(token)
            streams[row].push(token)
            if streams[row].stopped:
                done.add(row)
        # Decoded without what is before, as the harness does: SentencePiece's first space is lost.
        texts = [tokenizer.decode(ids) for ids in tokens]
        return [_before(text, how.until) for text in texts]

    def _report(self, what: str, total: int) -> Callable[[int], object]:
        return lambda done: self._progress(what, done, total)


def _unspelled(number: int, text: str, error: UserError) -> UserError:
    return UserError(f"request {number} of the task, {text[:40]!r}: {error}")


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _sum(logprobs: np.ndarray) -> float:
    return math.fsum(logprobs.tolist())
