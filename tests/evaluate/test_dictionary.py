"""The word dictionary: IBM model 1 against loops, and what it does with words and the rest."""

from collections import defaultdict

import numpy as np

from lmjax.evaluate.dictionary import Dictionary, learn_dictionary


def by_loops(pairs, iterations):
    """Expectation maximisation as Brown et al. write it: (source word -> best target word)."""
    p = defaultdict(lambda: 1.0)
    for _ in range(iterations):
        counts, totals = defaultdict(float), defaultdict(float)
        for source, target in pairs:
            candidates = ["", *target.split()]
            for s in source.split():
                norm = sum(p[s, t] for t in candidates)
                for t in candidates:
                    counts[s, t] += p[s, t] / norm
                    totals[t] += p[s, t] / norm
        p = defaultdict(float, {(s, t): c / totals[t] for (s, t), c in counts.items()})
    best = {}
    for (s, t), c in counts.items():
        if t and c > best.get(s, (0, ""))[0]:
            best[s] = c, t
    return {s: t for s, (_, t) in best.items()}


def test_equals_the_loops():
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(12)]
    pairs = []
    for _ in range(80):
        some = random.choice(words, random.integers(1, 7))
        target = [w.upper() for w in some if random.random() < 0.9] + ["THE"]
        random.shuffle(target)
        pairs.append((" ".join(some), " ".join(target)))
    found = learn_dictionary(pairs, iterations=5)
    assert dict(found.words) == by_loops(pairs, 5)
    assert sum(t == s.upper() for s, t in found.words.items()) == 12


def test_words_change_and_the_rest_stays():
    dictionary = Dictionary(words={"cell": "Zelle", "Sheet": "Tabelle"})
    assert dictionary.translate("Cell A1, (Sheet)!") == "Zelle A1, (Tabelle)!"
    assert learn_dictionary([]).translate("as it is") == "as it is"
