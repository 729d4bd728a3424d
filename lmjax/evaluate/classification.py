"""A classifier or a regression on held-out data, by what it says of each row."""

# N rows, C classes or values.

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.core import Dataset, LabelledDataset, Predicts, Session, Task
from lmjax.errors import UserError
from lmjax.evaluate import metrics

_MOST_DRAWN = 60  # classes of a picture
_SHARES = ("precision", "recall", "f1")


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Accuracy, macro-F1, AUC, and precision, recall and F1 of each class, of every row once.

    Of one label a row: `accuracy`, `macro_f1`, `auc` (of two classes that of the second, else the
    mean of each against the rest), `precision/NAME`, `recall/NAME`, `f1/NAME`; and a picture of the
    confusion matrix, as a PNG in the run's folder. Where several labels may hold for a row, each
    class is one of two: `accuracy` is the share of labels that are right, `macro_f1` the mean F1
    and `auc` the mean AUC over the classes, a probability above one half taken for yes. A number
    that is not defined is left out.

    Args:
      data: what to evaluate on; gone through once, in order.
      batch_size: examples per evaluation step, over all devices.
      picture: name of the picture, without its ending; "" for none.
      per_class: whether the numbers of each class are reported.
    """

    data: Dataset
    batch_size: int
    picture: str = "confusion"
    per_class: bool = True

    def __post_init__(self) -> None:
        _check_picture(self.picture)

    def check(self, task: Task, data: Dataset, *, ways: int) -> None:
        """The task must predict the labels of this data, which are those it is trained on."""
        _check(self.data, self.batch_size, task, data, ways)
        if not hasattr(self.data, "classes") or "labels" not in self.data.example:
            raise UserError(
                f"{type(self.data).__name__} has no labels to compare with: use Regression for "
                "values, or a data set with labels."
            )
        if tuple(self.data.classes) != tuple(getattr(data, "classes", ())):
            raise UserError(
                f"the evaluation's classes {list(self.data.classes)} are not the training's."
            )

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """Numbers by their names."""
        found = predictions(session, self.data, batch_size=self.batch_size)
        labelled: Any = self.data
        data: LabelledDataset = labelled
        names, scores_NC = data.classes, found["scores_BC"]
        if "labels_BC" in found:
            holds_NC = found["labels_BC"] > 0.5
            return _defined(_several(holds_NC, scores_NC, names, self.per_class))
        labels_N = found["labels_B"]
        counts_CC = metrics.confusion(labels_N, scores_NC.argmax(axis=1), len(names))
        if self.picture:
            picture = draw_confusion(counts_CC, names)
            session.keep(f"{self.picture}.png", picture)
        results = {
            "accuracy": float(np.diag(counts_CC).sum() / counts_CC.sum()),
            "macro_f1": metrics.macro_f1(counts_CC),
            "auc": metrics.auc_one_vs_rest(labels_N, scores_NC),
        }
        if self.per_class:
            shares = metrics.precision_recall_f1(counts_CC)
            results |= _by_class(names, dict(zip(_SHARES, shares, strict=True)))
        return _defined(results)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """`mae`, `rmse` and `r2` in the units of the table, of every row once.

    Args:
      data: what to evaluate on; gone through once, in order. Where it scales its values
        (`unscaled`), both they and the predictions are put back.
      batch_size: examples per evaluation step, over all devices.
    """

    data: Dataset
    batch_size: int

    def check(self, task: Task, data: Dataset, *, ways: int) -> None:
        """The task must predict the values of this data."""
        _check(self.data, self.batch_size, task, data, ways)
        if "values" not in self.data.example:
            raise UserError(
                f"{type(self.data).__name__} has no values to compare with: use Classification for "
                "labels, or a data set with values."
            )

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """Numbers by their names."""
        found = predictions(session, self.data, batch_size=self.batch_size)
        unscaled = getattr(self.data, "unscaled", lambda values_NC: values_NC)
        return metrics.regression_errors(unscaled(found["values_BC"]), unscaled(found["scores_BC"]))


def predictions(session: Session, data: Dataset, *, batch_size: int) -> dict[str, np.ndarray]:
    """What the task says of every row of the data set, in order; all of it on every process."""
    shard, num_shards = session.shards
    batches = data.epoch_batches(batch_size=batch_size, shard=shard, num_shards=num_shards)
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        told = session.predict(batch)
        real = np.asarray(told["weights_B"]) > 0
        for name, x in told.items():
            found.setdefault(name, []).append(np.asarray(x)[real])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def draw_confusion(counts_CC: np.ndarray, names: Sequence[str]) -> bytes:
    """A PNG of the confusion matrix: counts, coloured by the share of the label's row."""
    import vl_convert

    counts_CC, names = counts_CC[:_MOST_DRAWN, :_MOST_DRAWN], list(names)[:_MOST_DRAWN]
    rows = np.maximum(counts_CC.sum(axis=1), 1)
    cells = [
        {"label": a, "predicted": b, "count": int(n), "share": float(n / rows[i])}
        for i, a in enumerate(names)
        for b, n in zip(names, counts_CC[i], strict=True)
    ]
    size = max(36, min(80, 640 // max(len(names), 1)))
    axis = {"labelFontSize": 12, "titleFontSize": 13, "labelLimit": 160}
    position: dict[str, Any] = {
        "x": {
            "field": "predicted", "type": "nominal", "sort": names, "title": "predicted",
            "axis": axis | {"orient": "top", "labelAngle": -40},
        },
        "y": {
            "field": "label", "type": "nominal", "sort": names, "title": "label", "axis": axis,
        },
    }  # fmt: skip
    share = {"field": "share", "type": "quantitative"}
    scale = {"domain": [0, 1], "scheme": "blues"}
    right = int(np.trace(counts_CC))
    title = f"{right} of {int(counts_CC.sum())} right"
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "title": {"text": title, "anchor": "start", "fontSize": 14, "offset": 10},
        "width": {"step": size},
        "height": {"step": size},
        "data": {"values": cells},
        "layer": [
            {
                "mark": "rect",
                "encoding": position
                | {"color": share | {"scale": scale, "title": "share of the label"}},
            },
            {
                "mark": {"type": "text", "fontSize": 13},
                "encoding": position
                | {
                    "text": {"field": "count", "type": "quantitative"},
                    "color": {
                        "condition": {"test": "datum.share > 0.5", "value": "white"},
                        "value": "#333",
                    },
                },
            },
        ],
    }
    picture: bytes = vl_convert.vegalite_to_png(json.dumps(spec), scale=1.5)
    return picture


def _several(
    holds_NC: np.ndarray, scores_NC: np.ndarray, names: Sequence[str], per_class: bool
) -> dict[str, float]:
    """Numbers where several labels may hold."""
    yes_NC = scores_NC > 0.5
    tables = [
        metrics.confusion(holds, yes, 2) for holds, yes in zip(holds_NC.T, yes_NC.T, strict=True)
    ]
    shares_3C = np.array([[s[1] for s in metrics.precision_recall_f1(t)] for t in tables]).T
    areas = np.array([metrics.auc(h, s) for h, s in zip(holds_NC.T, scores_NC.T, strict=True)])
    known = areas[~np.isnan(areas)]
    results = {
        "accuracy": float(np.mean(holds_NC == yes_NC)),
        "macro_f1": float(np.mean(shares_3C[2])),
        "auc": float(np.mean(known)) if len(known) else float("nan"),
    }
    if per_class:
        shares = dict(zip(_SHARES, shares_3C, strict=True))
        results |= _by_class(names, shares | {"auc": areas})
    return results


def _defined(results: Mapping[str, float]) -> dict[str, float]:
    """Those that there is something to say of: no AUC of rows that are all alike."""
    return {name: x for name, x in results.items() if not math.isnan(x)}


def _by_class(names: Sequence[str], numbers: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {
        f"{what}/{name}": float(x)
        for what, x_C in numbers.items()
        for name, x in zip(names, x_C, strict=True)
    }


def _check(held: Dataset, batch_size: int, task: Task, data: Dataset, ways: int) -> None:
    if batch_size < 1 or batch_size % ways:
        raise UserError(
            f"an evaluation's batch_size is {batch_size}, which does not divide into {ways} "
            f"data-parallel parts: make it a multiple of {ways}."
        )
    if not isinstance(task, Predicts):
        raise UserError(f"{type(task).__name__} says nothing of single rows (no `predict`).")
    task.check(held)
    held.check()
    for name, text in data.fitted.items():
        if held.fitted.get(name) != text:
            raise UserError(f"the evaluation's data has another {name} than the training's.")


def _check_picture(name: str) -> None:
    if "/" in name or "\\" in name or name in (".", ".."):
        raise UserError(f"picture is {name!r}: give a file's name without folders.")
