"""What scikit-learn makes of the rows that configs/sentiment.py trains on, and is judged by.

TF-IDF and logistic regression on the same split: of words and pairs of them for English, and of
characters and pairs of them for Chinese, which writes no spaces. Prints the accuracy of each.

Command: python benchmarks/sentiment.py [english chinese]   (needs scikit-learn and the packages)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lmjax.config import build, call, load_config, override
from lmjax.data.vocabulary import Bytes

CONFIG = Path(__file__).parents[1] / "configs" / "sentiment.py"


def accuracy(variant: str) -> dict[str, float]:
    """Of TF-IDF with logistic regression on the variant's held-out rows, by what it counts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    config = load_config(f"{CONFIG}:{variant}")
    parts = []
    override(config, "data.vocabulary", call(Bytes))  # the rows alone are wanted
    for node in (config.data, config.evals.valid.data):
        rows = build(node).rows
        parts.append(([row.text for row in rows], [row.label for row in rows]))
    (texts, labels), (held_texts, held_labels) = parts
    kinds: dict[str, dict[str, Any]] = {
        "words": {"ngram_range": (1, 1)},
        "words and pairs": {"ngram_range": (1, 2)},
        "characters": {"analyzer": "char", "ngram_range": (1, 1)},
        "characters and pairs": {"analyzer": "char", "ngram_range": (1, 2)},
    }
    found = {}
    for name, how in kinds.items():
        model = make_pipeline(TfidfVectorizer(**how), LogisticRegression(max_iter=1000))
        found[name] = float(model.fit(texts, labels).score(held_texts, held_labels))
    most = max(set(labels), key=labels.count)
    found["the commonest class"] = held_labels.count(most) / len(held_labels)
    print(f"{variant}: {len(texts)} rows train, {len(held_texts)} are held out")
    return found


if __name__ == "__main__":
    for variant in sys.argv[1:] or ("english", "chinese"):
        for name, value in accuracy(variant).items():
            print(f"{variant}  {name}: {value:.4f}")
