"""Numbers of classifiers and regressions that are no means over rows: on the host, in float64."""

# N rows, C classes or values.

from __future__ import annotations

import math

import numpy as np


def confusion(labels_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> np.ndarray:
    """How many rows of each label (first axis) were taken for each class: int64 [C, C]."""
    pairs = np.asarray(labels_N, np.int64) * num_classes + np.asarray(predicted_N, np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def precision_recall_f1(counts_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class by the confusion matrix: three [C]; 0 where there is nothing to divide by.

    Precision is the share of what is taken for the class that is of it, recall the share of it
    that is taken for it, F1 their harmonic mean.
    """
    right = np.diag(counts_CC).astype(np.float64)
    taken, there = counts_CC.sum(axis=0), counts_CC.sum(axis=1)

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(right), where=whole > 0)

    return share(right, taken), share(right, there), share(2 * right, taken + there)


def macro_f1(counts_CC: np.ndarray) -> float:
    """The mean F1 over the classes that stand in a label or a prediction."""
    seen = (counts_CC.sum(axis=0) + counts_CC.sum(axis=1)) > 0
    return float(np.mean(precision_recall_f1(counts_CC)[2][seen])) if seen.any() else math.nan


def auc(holds_N: np.ndarray, scores_N: np.ndarray) -> float:
    """The probability that a row that holds scores above one that does not, ties counted half.

    Source: Mann & Whitney (1947): the area under the ROC curve is their rank statistic, Hanley &
    McNeil, Radiology 143 (1982). NaN where all rows hold, or none.
    """
    holds_N = np.asarray(holds_N, bool)
    many, few = int(holds_N.sum()), int((~holds_N).sum())
    if not many or not few:
        return math.nan
    _, place_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank_N = (last - (counts - 1) / 2)[place_N]  # from 1; equal scores share their mean rank
    return float((rank_N[holds_N].sum() - many * (many + 1) / 2) / (many * few))


def auc_one_vs_rest(labels_N: np.ndarray, scores_NC: np.ndarray) -> float:
    """The mean AUC of each class against all others; of two classes the AUC of the second.

    Classes of which no row is there, or that all rows are of, are left out of the mean.
    """
    classes = [1] if scores_NC.shape[1] == 2 else range(scores_NC.shape[1])
    found = np.array([auc(labels_N == c, scores_NC[:, c]) for c in classes])
    known = found[~np.isnan(found)]
    return float(np.mean(known)) if len(known) else math.nan


def regression_errors(values_NC: np.ndarray, predicted_NC: np.ndarray) -> dict[str, float]:
    """mae, rmse and r2, each the mean over the C values.

    r2 is 1 - squared error / squared distance from the mean; of a constant value it is NaN.
    """
    values_NC = np.asarray(values_NC, np.float64)
    error_NC = values_NC - np.asarray(predicted_NC, np.float64)
    squared_C = np.mean(np.square(error_NC), axis=0)
    spread_C = np.var(values_NC, axis=0)
    unexplained_C = np.divide(
        squared_C, spread_C, out=np.full_like(squared_C, math.nan), where=spread_C > 0
    )
    return {
        "mae": float(np.mean(np.abs(error_NC))),
        "rmse": float(np.mean(np.sqrt(squared_C))),
        "r2": float(np.mean(1 - unexplained_C)),
    }
