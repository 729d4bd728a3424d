"""Writes what scikit-learn finds for small problems: python -m tests.tasks.sklearn_reference

scikit-learn 1.9.1. The problems are drawn from a seed by `problem`, here and in the tests.
"""

from pathlib import Path

import numpy as np

STORED = Path(__file__).with_suffix(".npz")
C, ALPHA, RATIO = 0.7, 0.15, 0.4


def problem():
    """(x [60, 4], values [60, 2], two classes [60], three classes [60], scores [60, 3])."""
    random = np.random.default_rng(5)
    x = random.normal(size=(60, 4))
    values = x @ random.normal(size=(4, 2)) + random.normal(size=(60, 2)) + 1.0
    two = (x @ random.normal(size=4) + random.logistic(size=60) > 0.3).astype("i4")
    three = (x @ random.normal(size=(4, 3)) + random.gumbel(size=(60, 3))).argmax(1).astype("i4")
    scores = np.round(random.dirichlet(np.ones(3), size=60), 2)
    return x, values, two, three, scores / scores.sum(1, keepdims=True)


def solutions():
    """Kernels [4, outputs] and biases [outputs] by the name of what found them, and metrics."""
    from sklearn import linear_model as linear
    from sklearn import metrics

    x, values, two, three, scores = problem()
    exact = {"tol": 1e-12, "max_iter": 10**6}
    found = {
        "ols": linear.LinearRegression().fit(x, values),
        "ridge": linear.Ridge(alpha=ALPHA * 60).fit(x, values),
        "lasso": linear.Lasso(alpha=ALPHA, **exact).fit(x, values[:, :1]),
        "elastic": linear.ElasticNet(alpha=ALPHA, l1_ratio=RATIO, **exact).fit(x, values[:, :1]),
        "logistic": linear.LogisticRegression(C=C, **exact).fit(x, two),
        "multinomial": linear.LogisticRegression(C=C, **exact).fit(x, three),
    }
    stored = {}
    for name, model in found.items():
        stored[f"{name}/kernel"] = np.atleast_2d(model.coef_).T
        stored[f"{name}/bias"] = np.atleast_1d(model.intercept_)
    taken = scores.argmax(1)
    shares = metrics.precision_recall_fscore_support(three, taken, zero_division=0)
    stored |= {
        "confusion": metrics.confusion_matrix(three, taken),
        "shares": np.array(shares[:3]),
        "macro_f1": metrics.f1_score(three, taken, average="macro"),
        "auc_two": metrics.roc_auc_score(two, scores[:, 1]),
        "auc_three": metrics.roc_auc_score(three, scores, multi_class="ovr", average="macro"),
        "mae": metrics.mean_absolute_error(values, 0.9 * values),
        "rmse": metrics.root_mean_squared_error(values, 0.9 * values),
        "r2": metrics.r2_score(values, 0.9 * values),
    }
    return stored


if __name__ == "__main__":
    np.savez_compressed(STORED, **solutions())
