"""Perplexity and bits per byte of documents, by a window that slides over each."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmjax.data.source import Document
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError, did_you_mean
from lmjax.evaluate.score import Scorer, Span

Prefix = Literal["own", "bos"]
LONGEST = 2048  # of the windows, unless another length is asked for


def windows(num_tokens: int, *, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first, last, scored): of the tokens first..last - 1, the last `scored` are scored.

    Every token but the first, which only conditions, is scored once. The model reads at most
    `length` tokens at a time; from the second window on each gives `stride` tokens a score, the
    last perhaps fewer, and each of these sees at least length - stride + 1 tokens before it.

    Source: "Perplexity of fixed-length models" in the documentation of transformers; as in
    `get_rolling_token_windows` of lm-evaluation-harness (which is stride = length), the last
    window begins early enough to be as long as the others.
    """
    assert 0 < stride <= length
    done, end = 1, min(length + 1, num_tokens)
    while done < num_tokens:
        yield max(0, end - length - 1), end, end - done
        done, end = end, min(end + stride, num_tokens)


def start_ids(tokenizer: TextTokenizer) -> np.ndarray:
    """What the tokenizer's own files put before every text (Llama's bos), int32; often nothing."""
    ids = np.asarray(tokenizer.encode_prompt(""), np.int32)
    return ids if bos_id(tokenizer) in ids[:1] else ids[:0]


def bos_id(tokenizer: TextTokenizer) -> int:
    """The token that begins a text: bos, or where there is none the one that ends documents."""
    special = getattr(tokenizer, "special_id", None)
    found = special("bos_token") if special else None
    return tokenizer.end_id if found is None else int(found)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a decoder predicts documents.

    Args:
      documents: that were read.
      windows: into which they were cut.
      tokens: that were scored.
      bytes: UTF-8 bytes of text behind these.
      words: of the documents, cut at white space, as lm-evaluation-harness counts them.
      nll: negative log-likelihood of all of these tokens together, in nats.
      unscored: documents of a single token, of which nothing could be scored.
      length, stride: of the windows.
    """

    documents: int
    windows: int
    tokens: int
    bytes: int
    words: int
    nll: float
    unscored: int
    length: int
    stride: int

    def numbers(self) -> dict[str, float | None]:
        """Everything that is reported; None for what is too large for a float.

        `loss` is in nats per token; perplexities are exp(nll / tokens, words or bytes).
        """
        found = {
            "loss": self.nll / self.tokens,
            "perplexity": _exp(self.nll / self.tokens),
            "bits_per_byte": self.nll / math.log(2) / self.bytes if self.bytes else None,
            "byte_perplexity": _exp(self.nll / self.bytes) if self.bytes else None,
            "word_perplexity": _exp(self.nll / self.words),
        }
        return {**found, **dataclasses.asdict(self)}


def perplexity(
    scorer: Scorer,
    tokenizer: TextTokenizer,
    documents: Sequence[Document],
    *,
    length: int = 0,
    stride: int = 0,
    prefix: Prefix = "own",
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Scores documents, each on its own.

    Args:
      documents: texts; special tokens that they spell are text, as in training.
      length: tokens that the model reads at a time; 0 for its longest context, at most 2048.
      stride: how far the window slides; 0 for half of `length`. `length` gives disjoint windows.
      prefix: "own" begins each document as the tokenizer's files say; where they say nothing, its
        first token is not scored. "bos" begins with the bos token, or the end token where there is
        none, so that every token is scored, as in lm-evaluation-harness.
      progress: is told (windows done since, windows in all).

    Raises:
      UserError: where length and stride do not fit, the vocabulary cannot spell a document, nothing
        can be scored, or the model gives no finite numbers.
    """
    length, stride = check_window(length, stride, scorer.model.max_length)
    if prefix not in ("own", "bos"):
        raise UserError(f"prefix is {prefix!r}." + did_you_mean(str(prefix), ("own", "bos")))
    bos = np.array([bos_id(tokenizer)], np.int32)
    start = start_ids(tokenizer) if prefix == "own" else bos
    token_bytes = tokenizer.token_bytes()
    spans: list[Span] = []
    num_bytes = num_words = unscored = 0
    for document in documents:
        try:
            ids = np.asarray(tokenizer.encode(document.text), np.int32)
        except UserError as error:
            raise UserError(f"{document.name}: {error}") from error
        ids = np.concatenate([start, ids])
        if len(ids) < 2:
            unscored += 1
            continue
        cuts = windows(len(ids), length=length, stride=stride)
        spans += [Span(ids[first:last], scored) for first, last, scored in cuts]
        num_words += len(re.split(r"\s+", document.text))
        num_bytes += len(document.text.encode())
        num_bytes -= 0 if len(start) else int(token_bytes[ids[0]])
    if not spans:
        raise UserError(
            f"none of the {len(documents)} documents has a second token, and the first is not "
            "scored: give longer documents, or prefix='bos' (--prefix=bos)."
        )
    report = (lambda done: progress(done, len(spans))) if progress else None
    scored = scorer.score(spans, progress=report)
    nll = -math.fsum(float(np.sum(s.logprobs, dtype=np.float64)) for s in scored)
    if not math.isfinite(nll):
        raise UserError(
            f"the negative log-likelihood is {nll}: the model's logits are not finite. Was the "
            "checkpoint saved after the training diverged? Take an earlier --step."
        )
    return Perplexity(
        documents=len(documents),
        windows=len(spans),
        tokens=sum(span.scored for span in spans),
        bytes=num_bytes,
        words=num_words,
        nll=nll,
        unscored=unscored,
        length=length,
        stride=stride,
    )


def check_window(length: int, stride: int, longest: int) -> tuple[int, int]:
    """(length, stride) with what 0 stands for; raises UserError where they do not fit."""
    size = length or min(longest, LONGEST)
    if not 0 < size <= longest:
        raise UserError(f"length is {length}: give 1 to {longest}, the model's longest context.")
    step = stride or max(1, size // 2)
    if not 0 < step <= size:
        raise UserError(
            f"stride is {stride}: give 1 to {size}, the length of the window. Above it, tokens "
            "would be left out."
        )
    return size, step


def _exp(nats: float) -> float | None:
    return math.exp(nats) if nats < 700 else None
