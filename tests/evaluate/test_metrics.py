"""Metrics against scikit-learn's (stored) and against counting."""

import itertools
import math

import numpy as np
import pytest

from lmjax.evaluate import metrics
from tests.tasks.sklearn_reference import STORED, problem, solutions

_, VALUES, TWO, THREE, SCORES = problem()


@pytest.fixture(scope="module")
def stored():
    with np.load(STORED) as arrays:
        return dict(arrays)


def test_equal_to_sklearn(stored):
    counts = metrics.confusion(THREE, SCORES.argmax(1), 3)
    np.testing.assert_array_equal(counts, stored["confusion"])
    np.testing.assert_allclose(metrics.precision_recall_f1(counts), stored["shares"], rtol=1e-12)
    errors = metrics.regression_errors(VALUES, 0.9 * VALUES)
    found = {
        "macro_f1": metrics.macro_f1(counts),
        "auc_two": metrics.auc(TWO == 1, SCORES[:, 1]),
        "auc_three": metrics.auc_one_vs_rest(THREE, SCORES),
        **errors,
    }
    for name, x in found.items():
        np.testing.assert_allclose(x, stored[name], rtol=1e-12, err_msg=name)


def test_auc_counts_pairs():
    """The share of pairs in the right order, with half of the ties, of scores with many ties."""
    random = np.random.default_rng(0)
    holds, scores = random.random(50) < 0.3, random.integers(0, 6, 50)
    pairs = list(itertools.product(scores[holds], scores[~holds]))
    want = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert metrics.auc(holds, scores) == pytest.approx(want, abs=1e-12)
    assert metrics.auc(holds, np.zeros(50)) == 0.5
    assert math.isnan(metrics.auc(np.ones(50), scores))


def test_of_nothing():
    """Classes of which there is no row and no prediction: 0, and not in the macro mean."""
    counts = metrics.confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 4)
    np.testing.assert_array_equal(metrics.precision_recall_f1(counts)[0], [1, 0.5, 0, 0])
    assert metrics.macro_f1(counts) == pytest.approx(2 / 3)
    assert math.isnan(metrics.macro_f1(np.zeros((2, 2), int)))
    scores = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.3, 0.7, 0]])
    assert metrics.auc_one_vs_rest(np.array([0, 0, 1]), scores) == pytest.approx(0.5)
    assert math.isnan(metrics.regression_errors(np.ones((3, 1)), np.zeros((3, 1)))["r2"])


@pytest.mark.slow
def test_stored_is_what_sklearn_says(stored):
    pytest.importorskip("sklearn")
    for name, x in solutions().items():
        np.testing.assert_allclose(x, stored[name], rtol=1e-6, atol=1e-6, err_msg=name)
