"""A classifier that lmjax trained as a labeller of `lmjax.prepare`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import UserError

SHORTEST = 16  # tokens of the first bucket of lengths


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Labels texts by a run of `tasks.classify.Classify`; honours `prepare`'s `Labeller`.

    It pickles as its fields, and a process reads the run once, when it is first asked. Texts are
    cut as in training; each (rows, length) of a batch, both powers of two, is compiled once.

    Args:
      workdir: of the run.
      step: of the checkpoint; 0 for the newest.
      positive: the class whose probability is the score, whichever is likeliest; "" for the
        likeliest's own.
      batch_size: texts at a time.
    """

    workdir: str
    step: int = 0
    positive: str = ""
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.step < 0:
            raise UserError(
                f"batch_size is {self.batch_size} and step {self.step}: give at least 1 and 0."
            )

    def files(self) -> list[str]:
        """The checkpoint's manifest, which names every bit of it."""
        from lmjax.engine.stored import find

        folder = find(Path(self.workdir).expanduser(), self.step or None)[-1].folder
        return [str(path) for path in sorted((folder / "about").rglob("*")) if path.is_file()]

    @property
    def source(self) -> str:
        """Names the checkpoint: the beginning of its hash."""
        return _load(self.workdir, self.step).source

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that it gives."""
        return _load(self.workdir, self.step).classes

    def predict(self, texts: Sequence[str]) -> tuple[list[str | None], list[float | None]]:
        """The likeliest label of each text and a probability; None for a text without tokens."""
        run = _load(self.workdir, self.step)
        if self.positive and self.positive not in run.classes:
            raise UserError(
                f"positive is {self.positive!r}, and {self.workdir} has the classes "
                f"{list(run.classes)}."
            )
        labels: list[str | None] = [None] * len(texts)
        scores: list[float | None] = [None] * len(texts)
        real = [n for n, text in enumerate(texts) if text.strip()]
        probabilities = run.probabilities([texts[n] for n in real], batch_size=self.batch_size)
        for n, row in zip(real, probabilities, strict=True):
            best = int(np.argmax(row))
            labels[n] = run.classes[best]
            scores[n] = float(row[run.classes.index(self.positive) if self.positive else best])
        return labels, scores


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run that was read.

    Attributes:
      predict: a batch -> probabilities, [rows, classes].
      tokenizer: of the run.
      classes: the names of the probabilities.
      length: tokens of the longest row.
      source: the beginning of the checkpoint's hash.
    """

    predict: Callable[[Any], Any]
    tokenizer: Any
    classes: tuple[str, ...]
    length: int
    source: str

    def probabilities(self, texts: Sequence[str], *, batch_size: int) -> np.ndarray:
        """Of each class for each text, float32 [texts, classes]."""
        from lmjax.data.encoded import encode_texts, pad_rows

        encoded = encode_texts(self.tokenizer, texts, length=self.length)
        found = np.zeros((len(texts), len(self.classes)), np.float32)
        lengths = np.diff(encoded.starts)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size].tolist()
            longest = max(SHORTEST, int(lengths[rows[-1]]))
            filled = rows + [rows[0]] * (min(batch_size, _bucket(len(rows))) - len(rows))
            length = min(self.length, _bucket(longest))
            batch = pad_rows(encoded.ids, encoded.starts, filled, length)
            found[rows] = np.asarray(self.predict(batch))[: len(rows)]
        return found


@functools.lru_cache(maxsize=4)
def _load(workdir: str, step: int) -> _Run:
    import jax

    from lmjax.config import build, from_dict
    from lmjax.data.tokenizer import tokenizer_from_json
    from lmjax.engine.checkpoint import Checkpoints
    from lmjax.tasks.classify import Classify

    folder = Path(workdir).expanduser()
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{workdir} holds no run: there is no {folder / 'checkpoints'}.")
    checkpoints = Checkpoints(folder / "checkpoints")
    _, variables, about = checkpoints.restore_for_inference(step or None)
    checkpoints.close()
    config: Any = about.get("config")
    node = config.get("task") if isinstance(config, dict) else None
    if not isinstance(node, dict) or "classes" not in about or "tokenizer" not in about:
        raise UserError(f"{workdir} is no run that learned to label texts.")
    model: Any = build(from_dict(node["model"]))
    task = Classify(model=model, activation=node.get("activation", "softmax"))
    held = jax.device_put(variables)
    scores = jax.jit(lambda variables, batch: task.predict(variables, batch)["scores_BC"])
    length = config.get("data", {}).get("length")
    return _Run(
        predict=lambda batch: scores(held, batch),
        tokenizer=tokenizer_from_json(about["tokenizer"]),
        classes=tuple(json.loads(about["classes"])),
        length=length if isinstance(length, int) else model.encoder.max_length,
        source=about["sha256"][:12],
    )


def _bucket(number: int) -> int:
    """The power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
