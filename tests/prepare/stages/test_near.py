import pickle
import random
import re

import numpy as np
import pytest
import scipy.sparse

from lmjax.errors import UserError
from lmjax.prepare.split import Split
from lmjax.prepare.stages.near import Near
from tests.prepare.stages import drive, texts

WORD = re.compile(r"[^\W_]+")


def brute_force(documents: list[str], n: int = 5) -> dict[tuple[int, int], float]:
    """The Jaccard index of every pair that shares a shingle, from sets of tuples of words."""
    numbers: dict[tuple[str, ...], int] = {}
    rows, columns = [], []
    for i, text in enumerate(documents):
        found = WORD.findall(text.lower())
        count = max(len(found) - n + 1, min(len(found), 1))
        shingles = {tuple(found[k : k + n]) for k in range(count)}
        rows += [i] * len(shingles)
        columns += [numbers.setdefault(shingle, len(numbers)) for shingle in shingles]
    shape = len(documents), len(numbers)
    x_NS = scipy.sparse.csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape)
    size = np.asarray(x_NS.sum(axis=1)).ravel()
    shared = (x_NS @ x_NS.T).tocoo()
    upper = shared.row < shared.col
    a, b, both = shared.row[upper], shared.col[upper], shared.data[upper]
    index = both / (size[a] + size[b] - both)
    return dict(zip(zip(a.tolist(), b.tolist(), strict=True), index.tolist(), strict=True))


def groups(pairs: set[tuple[int, int]], count: int) -> list[int]:
    """The first member of each one's group, by spreading the least number until nothing moves."""
    first = list(range(count))
    moved = True
    while moved:
        moved = False
        for a, b in pairs:
            low = min(first[a], first[b])
            moved |= first[a] != low or first[b] != low
            first[a] = first[b] = low
    return first


def found_pairs(stage: Near, documents: list[str]) -> set[tuple[int, int]]:
    """Pairs that the stage verifies, from its own steps."""
    pairs: set[tuple[int, int]] = set()

    class Spy(Near):
        def settle(self, decisions):
            later, earlier = decisions["order"].to_pylist(), decisions["other_order"].to_pylist()
            pairs.update(((b - 3) // 7, (a - 3) // 7) for a, b in zip(later, earlier, strict=True))
            return super().settle(decisions)

    drive.run(Spy(**vars(stage)), drive.records(documents))
    return pairs


def planted(seed: int = 0) -> list[str]:
    """Pieces of plays, and copies of some of them with every k-th word replaced, shuffled."""
    draw = random.Random(seed)
    pieces = texts.plays()[::9]
    copies = []
    for piece in pieces[:60]:
        for rate in draw.sample([0.001, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05], 3):
            parts = piece.split(" ")
            parts = [f"w{i}" if draw.random() < rate else part for i, part in enumerate(parts)]
            copies.append(" ".join(parts))
    copies += [piece.upper().replace(",", " --") for piece in pieces[60:70]]  # equal words
    documents = [*pieces, *copies, "", "?!", "short", "Short!", "four words of text"]
    draw.shuffle(documents)
    return documents


def recall_of_pairs(found: set[tuple[int, int]], index: dict[tuple[int, int], float]) -> float:
    """Of pairs of 0.8 and more, the fraction that was found.

    Copies with the same shingles are compared with their first alone, so pairs of others with them
    are left out.
    """
    copies = {later for (_, later), value in index.items() if value == 1}
    true = {p for p, value in index.items() if value >= 0.8 and not copies & set(p)}
    assert len(true) > 80
    return len(true & found) / len(true)


def test_planted_near_duplicates_are_found_as_by_brute_force():
    documents = planted()
    index = brute_force(documents)
    found = found_pairs(Near(), documents)
    assert all(index[pair] >= 0.8 for pair in found)
    assert recall_of_pairs(found, index) >= 0.97


def test_groups_and_their_first_depend_on_no_shard_or_exchange():
    documents = planted(1)
    table = drive.records(documents)
    stage = pickle.loads(pickle.dumps(Near()))
    results = [drive.run(stage, table, shards=s, exchanges=e) for s, e in ((1, 1), (9, 4), (40, 1))]
    for other in results[1:]:
        assert other.kept.equals(results[0].kept)
        assert other.dropped.equals(results[0].dropped)
        assert other.counts == results[0].counts
    first = groups(found_pairs(stage, documents), len(documents))
    ids = table["id"].to_pylist()
    kept = [ids[i] for i, head in enumerate(first) if i == head]
    assert results[0].kept["id"].to_pylist() == kept == results[0].kept["group"].to_pylist()
    heads = {row["id"]: row["detail"].split(" ")[0] for row in results[0].dropped.to_pylist()}
    assert heads == {ids[i]: ids[head] for i, head in enumerate(first) if i != head}

    marked = drive.run(Near(mode="mark"), table, shards=3)
    assert len(marked.dropped) == 0
    assert marked.kept["group"].to_pylist() == [ids[head] for head in first]
    assert marked.counts == results[0].counts


def test_characters_find_what_words_miss():
    base = texts.plays()[0]
    parts = base.split(" ")
    parts[::7] = [part[:1] + part for part in parts[::7]]  # a letter doubled, in every 7th word
    table = drive.records([base, " ".join(parts)])
    assert len(drive.run(Near(threshold=0.5), table).kept) == 2
    assert len(drive.run(Near(unit="characters", threshold=0.6), table).kept) == 1


def test_a_crowd_of_equal_records_costs_no_square():
    crowd = [f"{'same words here ' * 20}{'!' * i}" for i in range(300)]
    table = drive.records(crowd)
    ordered = table.append_column("order", [list(range(300))])
    keys = Near().keys(ordered).sort_by([("key", "ascending"), ("order", "ascending")])
    assert len(Near().reduce(keys)) == 2 * 299
    assert drive.run(Near(), table).kept["id"].to_pylist() == ["s/file#0"]


def test_a_crowd_of_near_duplicates_is_one_group():
    base = texts.plays()[3].split(" ")
    crowd = [" ".join([*base[:i], f"w{i}", *base[i + 1 :]]) for i in range(100)]
    documents = [*crowd, *texts.plays()[4:30]]
    random.Random(5).shuffle(documents)
    table = drive.records(documents)
    true = {pair for pair, value in brute_force(documents).items() if value >= 0.8}
    first = groups(true, len(documents))
    ids = table["id"].to_pylist()
    marked = drive.run(Near(mode="mark"), table, shards=4, exchanges=3).kept
    assert marked["group"].to_pylist() == [ids[i] for i in first]
    ordered = table.append_column("order", [list(range(len(documents)))])
    keys = Near().keys(ordered).sort_by([("key", "ascending"), ("order", "ascending")])
    assert len(Near().reduce(keys)) < 100 * 99 / 2  # all pairs of the crowd are twice that


def test_bad_fields_are_named():
    for fields in ({"unit": "word"}, {"mode": "keep"}, {"threshold": 0.0}, {"bands": 0}):
        with pytest.raises(UserError, match=next(iter(fields))):
            Near(**fields)


@pytest.mark.slow
def test_recall_and_precision_on_5000_real_documents():
    pages = [*texts.kernel_pages(), *texts.mail_bodies()]
    documents = random.Random(0).sample(pages, 5000)
    index = brute_force(documents)
    true = {pair for pair, value in index.items() if value >= 0.8}
    found = found_pairs(Near(), documents)
    recall, precision = recall_of_pairs(found, index), len(true & found) / len(found)
    first, true_first = groups(found, 5000), groups(true, 5000)
    dropped = {i for i in range(5000) if first[i] != i}
    true_dropped = {i for i in range(5000) if true_first[i] != i}
    both = len(dropped & true_dropped)
    print(f"{len(true)} pairs: recall {recall:.4f}, precision {precision:.4f}; ", end="")
    print(f"documents: {both} of {len(true_dropped)} dropped, {len(dropped)} in all")
    assert recall >= 0.95 and precision >= 0.99
    assert both >= 0.95 * len(true_dropped) and both >= 0.99 * len(dropped)


def straddling(documents: list[str]) -> tuple[int, int]:
    """(pairs of 0.8 and more that a split in halves parts, all such pairs)."""
    marked = drive.run(Near(mode="mark"), drive.records(documents), shards=5).kept
    halves = Split(valid=0.5)(marked).kept["split"].to_pylist()
    assert 0.4 < halves.count("valid") / len(halves) < 0.6
    true = [pair for pair, value in brute_force(documents).items() if value >= 0.8]
    return sum(halves[a] != halves[b] for a, b in true), len(true)


def test_near_duplicates_fall_in_one_half():
    parted, pairs = straddling(planted(2))
    assert pairs > 80 and parted == 0


@pytest.mark.slow
def test_near_duplicates_of_real_documents_fall_in_one_half():
    pages = [*texts.kernel_pages(), *texts.mail_bodies()]
    parted, pairs = straddling(random.Random(1).sample(pages, 5000))
    print(f"{parted} of {pairs} pairs are parted")
    assert pairs > 200 and parted <= 0.005 * pairs
