"""scikit-learn's logistic regression on the data of a config, for the same split.

Command: pip install scikit-learn
         python -m benchmarks.logistic configs/digits.py [configs/deepfm.py ...]

Its inputs are what the model reads: categories as zeros and ones, numbers, pixels. Prints accuracy
on the validation split and, of two classes, the area under the ROC curve.
"""

import dataclasses
import sys

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lmjax.config import build, load_config

MOST = 2**16  # categories


def inputs(batches):
    """(matrix of inputs, labels) of all rows that count."""
    held = [{k: np.asarray(v)[b["weights"] > 0] for k, v in b.items()} for b in batches]
    rows = {k: np.concatenate([b[k] for b in held]) for k in held[0]}
    parts = []
    if "categories" in rows:
        codes = rows["categories"]
        where = (np.repeat(np.arange(len(codes)), codes.shape[1]), codes.ravel())
        parts.append(sparse.csr_matrix((np.ones(codes.size), where), (len(codes), 1 + MOST)))
    parts += [
        sparse.csr_matrix(rows[k].reshape(len(rows[k]), -1))
        for k in ("features", "images")
        if k in rows
    ]
    return sparse.hstack(parts).tocsr(), rows["labels"]


def main(path):
    data = build(load_config(path).data)
    data = getattr(data, "data", data)  # of an augmented data set, what lies within
    splits = [dataclasses.replace(data, split=split) for split in ("train", "valid")]
    (x, y), (held_x, held_y) = (inputs(split.epoch_batches(batch_size=1024)) for split in splits)
    model = LogisticRegression(max_iter=2000).fit(x, y)
    line = (
        f"{path}: {len(y)} rows, {len(held_y)} held out: accuracy {model.score(held_x, held_y):.4f}"
    )
    if len(model.classes_) == 2:
        line += f", AUC {roc_auc_score(held_y, model.predict_proba(held_x)[:, 1]):.4f}"
    print(line)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
