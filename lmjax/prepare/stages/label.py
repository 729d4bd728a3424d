"""Labels and scores from rules, models or services, with who gave them; filters by what they say.

A labeller is any object with `predict(texts) -> (labels, scores)`: a function wrapped by
`Heuristic`, a model, an address. One that lmjax trained is a class with that method which loads
its run, named in the config like any other.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from lmjax.errors import UserError
from lmjax.prepare.stage import Reading, Result, judged, set_aside, with_column


class Labeller(Protocol):
    """Whatever gives labels; picklable, and loading what it needs when it is first called."""

    def predict(self, texts: Sequence[str]) -> tuple[Sequence[str | None], Sequence[float | None]]:
        """A label and a score for each text; a label of None could not be given.

        May raise `Unlabelled` where it can say why not.
        """


class Unlabelled(Exception):
    """Why a batch of texts got no labels: its records go to quarantine for this reason."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """Adds the columns `label:NAME`, `label_by:NAME` and `score:NAME`.

    Of several labellers the first decides, and where the others differ is counted: for each of them
    the records whose label is another than the first's. So it is with labels of this name that the
    records have already: those stay, as the first opinion.

    Args:
      name: of the label.
      labellers: by the name that `label_by` gives them, in their order; where one has a `source`,
        `label_by` has that too, after the name.
      batch_size: texts that a labeller gets at once.
    """

    name: str
    labellers: Mapping[str, Any]
    batch_size: int = 256

    def __post_init__(self) -> None:
        for by, labeller in self.labellers.items():
            if not callable(getattr(labeller, "predict", None)):
                raise UserError(f"labellers: {by} has no method predict(texts): {labeller!r}.")
        if not self.name or not self.labellers or self.batch_size < 1:
            raise UserError("a Label needs a name, at least one labeller and a batch_size from 1.")

    def files(self) -> list[str]:
        """Files that the labellers read."""
        readers = [x for x in self.labellers.values() if isinstance(x, Reading)]
        return [path for reader in readers for path in reader.files()]

    def __call__(self, records: pa.Table) -> Result:
        """Labels all records; those that a labeller failed on go to quarantine."""
        texts = records["text"].to_pylist()
        opinions: dict[str, tuple[list[Any], list[Any]]] = {}
        column, by_column, score = (f"{p}:{self.name}" for p in ("label", "label_by", "score"))
        givers: list[Any] | None = None
        if column in records.column_names:
            givers = records[by_column].to_pylist()
            opinions["before"] = records[column].to_pylist(), records[score].to_pylist()
        failed: dict[str, str] = {}
        for by, labeller in self.labellers.items():
            labels, scores, reasons = self._ask(by, labeller, texts)
            opinions[by] = labels, scores
            ids = records["id"].to_pylist() if reasons else []
            failed |= {ids[row]: reason for row, reason in reasons.items()}
        first, *others = opinions
        labels, scores = opinions[first]
        counts = {f"{self.name} {label}": 0 for label in sorted({x for x in labels if x})}
        for label in filter(None, labels):
            counts[f"{self.name} {label}"] += 1
        for other in others:
            pairs = zip(labels, opinions[other][0], strict=True)
            differ = sum(None not in pair and pair[0] != pair[1] for pair in pairs)
            counts[f"{self.name}: {other} disagrees with {first}"] = differ
        if givers is None:
            source = getattr(self.labellers[first], "source", "")  # which weights it had
            givers = [f"{first} {source}" if source else first] * len(texts)
        records_out = with_column(records, column, pa.array(labels, pa.string()))
        records_out = with_column(records_out, by_column, pa.array(givers, pa.string()))
        records_out = with_column(records_out, score, pa.array(scores, pa.float64()))
        result = Result(kept=records_out, counts=counts)
        return set_aside(result, records, failed, file=self.name) if failed else result

    def _ask(
        self, by: str, labeller: Labeller, texts: Sequence[str]
    ) -> tuple[list[str | None], list[float | None], dict[int, str]]:
        """(labels, scores, reasons by row of what failed) of one labeller."""
        starts = range(0, len(texts), self.batch_size)
        batches = [texts[start : start + self.batch_size] for start in starts]

        def one(batch: Sequence[str]) -> tuple[Sequence[Any], Sequence[Any], str]:
            try:
                labels, scores = labeller.predict(batch)
                wrong = len(labels) != len(batch) or len(scores) != len(batch)
                if not wrong:
                    return labels, scores, f"{by} gave no label"
                why = f"{by} gave {len(labels)} labels, {len(scores)} scores for {len(batch)} texts"
            except Unlabelled as error:
                why = f"{by}: {error}"
            return [None] * len(batch), [None] * len(batch), why

        labels: list[str | None] = []
        scores: list[float | None] = []
        reasons: dict[int, str] = {}
        with ThreadPoolExecutor(max(int(getattr(labeller, "concurrency", 1)), 1)) as pool:
            for given, sure, why in pool.map(one, batches):
                for label, value in zip(given, sure, strict=True):
                    if label is None:
                        reasons[len(labels)] = why
                    labels.append(None if label is None else str(label))
                    scores.append(None if value is None else float(value))
        return labels, scores, reasons


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Drops records by a label, or by its score.

    Args:
      name: of the label.
      keep: labels that go on; () for all.
      drop: labels that do not.
      min_score: the least score; None for no limit. A record without a score has none to pass.
      max_score: the largest.
    """

    name: str
    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    min_score: float | None = None
    max_score: float | None = None

    def __call__(self, records: pa.Table) -> Result:
        """Drops for "label NAME" or "score NAME"."""
        column, score = f"label:{self.name}", f"score:{self.name}"
        if column not in records.column_names:
            raise UserError(
                f"records have no label {self.name!r}: give it by an earlier stage Label(name=...)."
            )
        labels, scores = records[column].to_pylist(), records[score].to_pylist()
        low = float("-inf") if self.min_score is None else self.min_score
        high = float("inf") if self.max_score is None else self.max_score
        limited = self.min_score is not None or self.max_score is not None
        reasons: list[str | None] = []
        for label, value in zip(labels, scores, strict=True):
            if label in self.drop or (self.keep and label not in self.keep):
                reasons.append(f"label {self.name}")
            elif limited and (value is None or not low <= value <= high):
                reasons.append(f"score {self.name}")
            else:
                reasons.append(None)
        details = [f"{label} {value}" for label, value in zip(labels, scores, strict=True)]
        return judged(records, reasons, details=details)


@dataclass(frozen=True, kw_only=True)
class Heuristic:
    """A function of one text as a labeller; `ref(module.function)` names it in a config.

    Args:
      function: from a text to a label, or to (label, score).
    """

    function: Callable[[str], Any]

    def predict(self, texts: Sequence[str]) -> tuple[list[str | None], list[float | None]]:
        """Its label of each text; a score of 1 where it gives none."""
        answers = [self.function(text) for text in texts]
        pairs = [answer if isinstance(answer, tuple) else (answer, 1.0) for answer in answers]
        return [label for label, _ in pairs], [score for _, score in pairs]


@dataclass(frozen=True, kw_only=True)
class FastText:
    """A classifier in fastText's format (Joulin et al., arXiv:1607.01759), as of FineWeb or DCLM.

    Args:
      path: of the .bin or .ftz file; its labels lose the "__label__" before them.
      positive: the label whose probability is the score, whichever label is likeliest; "" for the
        likeliest's own.
    """

    path: str
    positive: str = ""

    def files(self) -> list[str]:
        """The model's file."""
        return [self.path]

    def predict(self, texts: Sequence[str]) -> tuple[list[str | None], list[float | None]]:
        """The likeliest label of each text, lines joined, and a probability."""
        model = _load_fasttext(self.path)
        labels: list[str | None] = []
        scores: list[float | None] = []
        for text in texts:
            names, chances = model.predict(" ".join(text.split()), k=-1)
            found = {
                n.removeprefix("__label__"): min(float(c), 1.0)
                for n, c in zip(names, chances, strict=True)
            }
            best = max(found, key=lambda name: found[name]) if found else None
            labels.append(best)
            scores.append(found.get(self.positive or best or "", 0.0))
        return labels, scores


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A service that takes {"texts": [...]} by POST; it answers {"labels": [...], "scores": [...]}.

    Args:
      url: http:// or https://.
      timeout_s: for each request.
      retries: how often a request is repeated that timed out, was refused or got a status of 429
        or 5xx.
      backoff_s: the wait before the first repetition; each next is twice as long, or what the
        answer's Retry-After says.
      concurrency: requests at once.
      headers: sent with each request ("Authorization": ...); $NAME in a value is the environment's.
    """

    url: str
    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0
    concurrency: int = 4
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url={self.url!r} must begin with http:// or https://.")

    def predict(self, texts: Sequence[str]) -> tuple[list[str | None], list[float | None]]:
        """Asks the service; raises Unlabelled with its last answer."""
        headers = {name: os.path.expandvars(value) for name, value in self.headers.items()}
        body = json.dumps({"texts": list(texts)}).encode()
        request = urllib.request.Request(
            self.url, body, {"Content-Type": "application/json", **headers}
        )
        wait = self.backoff_s
        for left in range(self.retries, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                    return _answer(answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    why = f"status {error.code}"
                    again = error.code == 429 or error.code >= 500
                    told = error.headers.get("Retry-After", "")
                    wait = float(told) if told.isdigit() else wait
            except (OSError, http.client.HTTPException) as error:
                # refused, reset, timed out (URLError is one); no HTTP, or half an answer
                why, again = f"{getattr(error, 'reason', error) or type(error).__name__}", True
            if not again or not left:
                raise Unlabelled(f"{self.url}: {why}")
            time.sleep(wait)
            wait *= 2
        raise AssertionError("the last try returns or raises")


def _answer(raw: bytes) -> tuple[list[str | None], list[float | None]]:
    try:
        told = json.loads(raw)
        labels, scores = told["labels"], told.get("scores") or [None] * len(told["labels"])
        return (
            [None if label is None else str(label) for label in labels],
            [None if score is None else float(score) for score in scores],
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unlabelled(
            f"answered no {{'labels': [...]}}: {raw[:80].decode(errors='replace')!r}"
        ) from error


@functools.lru_cache(maxsize=4)
def _load_fasttext(path: str) -> Any:
    try:
        import fasttext
    except ImportError as error:
        raise UserError(
            "fastText's models need `pip install fasttext-predict` (lmjax[prepare])."
        ) from error
    if not Path(path).is_file():
        raise UserError(f"path={path!r} is no file.")
    return fasttext.load_model(path)
