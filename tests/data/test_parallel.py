"""Pairs in rows: every pair once, whole, apart; batches a function of (seed, step)."""

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest

from lmjax.data.pair_rows import rows_of
from lmjax.data.parallel import Parallel, validation
from lmjax.data.vocabulary import Bytes
from lmjax.errors import UserError

DATA = Parallel(length=96, source_length=24, vocabulary=Bytes(), valid_fraction=0.2)


def pairs_in(batch):
    """(source text, target text) of every pair of every row, read by segments and positions."""
    tokenizer, found = DATA.tokenizer, []
    for row in range(len(batch["source"])):
        assert batch["source_segments"][row].max() == batch["segments"][row].max()
        for pair in range(1, batch["segments"][row].max() + 1):
            texts = []
            for ids, prefix in (("source", "source_"), ("targets", "")):
                own = batch[f"{prefix}segments"][row] == pair
                positions = batch[f"{prefix}positions"][row][own]
                np.testing.assert_array_equal(positions, np.arange(own.sum()))
                texts.append(batch[ids][row][own])
            assert texts[1][-1] == tokenizer.end_id
            assert tokenizer.end_id not in texts[1][:-1]
            found.append(tuple(tokenizer.decode(text) for text in texts))
    return found


@pytest.mark.parametrize("packing", ["fit", "none"])
def test_an_epoch_has_every_pair_once(packing):
    data = dataclasses.replace(DATA, packing=packing)
    for split in (data, validation(data)):
        batches = list(split.epoch_batches(batch_size=8))
        found = [pair for batch in batches for pair in pairs_in(batch)]
        assert sorted(found) == sorted((p.source, p.target) for p in split.pairs)
        for batch in batches:
            np.testing.assert_array_equal(batch["weights"], batch["segments"] > 0)
        if packing == "none":
            assert max(batch["segments"].max() for batch in batches) == 1
        else:
            assert len(batches) * 8 < len(found) / 2


def test_the_training_split_is_permuted_each_epoch():
    rows, n = DATA.stacked(seed=3), DATA.num_examples
    epochs = [rows.rows(range(start, start + n)) for start in (0, n)]
    keys = [[targets.tobytes() for targets in epoch["targets"]] for epoch in epochs]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])


def test_batches_are_a_function_of_seed_and_step():
    whole = list(itertools.islice(DATA.batches(batch_size=8, seed=1), 5))
    late = next(DATA.batches(batch_size=8, seed=1, start=4))
    halves = [next(DATA.batches(batch_size=8, seed=1, shard=i, num_shards=2)) for i in (0, 1)]
    other = next(DATA.batches(batch_size=8, seed=2))
    assert {n: x.shape[1:] for n, x in late.items()} == {
        n: s.shape for n, s in DATA.example.items()
    }
    for name, expected in whole[4].items():
        np.testing.assert_array_equal(late[name], expected)
        both = np.concatenate([half[name] for half in halves])
        np.testing.assert_array_equal(both, whole[0][name])
    assert (other["targets"] != whole[0]["targets"]).any()
    assert DATA.epochs(2 * DATA.num_examples) == {"numbers": 2}


def test_reversed_is_the_same_split_the_other_way_round():
    turned = dataclasses.replace(DATA, reverse=True, length=24, source_length=96)
    assert [(p.target, p.source) for p in turned.pairs] == [
        (p.source, p.target) for p in DATA.pairs
    ]
    assert turned.fitted == DATA.fitted
    assert turned.fingerprint != DATA.fingerprint


def test_long_pairs_are_left_out_and_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    sizes = [(3, 4), (10, 4), (3, 9), (1, 8)]
    rows = [{"source": "s" * s, "target": "t" * (t - 1) + str(i)} for i, (s, t) in enumerate(sizes)]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"source": "", "target": "x"}')
    data = Parallel(
        path=str(path), length=9, source_length=5, vocabulary=Bytes(), valid_fraction=0.0
    )
    assert data.counts["left out: too long"] == 2  # 10 tokens of source; 9 and the end of target
    assert data.counts["pairs"] == 2
    assert data.counts["refused: empty source"] == len(data.refused) == 1
    with pytest.raises(UserError, match=r"no pair of the train split .* fits into 1 tokens"):
        dataclasses.replace(data, length=1, source_length=1).check()
    with pytest.raises(UserError, match=r"the valid split of .* holds no pairs"):
        validation(data).check()


def test_rows_hold_all_and_are_nearly_full():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 40, (3000, 2))
    rows = rows_of(sizes, (100, 110))
    assert sorted(itertools.chain(*rows)) == list(range(3000))
    assert all((sizes[row].sum(axis=0) <= (100, 110)).all() for row in rows)
    assert sizes[:, 0].sum() / (100 * len(rows)) > 0.95


def test_pickles_for_worker_processes():
    examples = pickle.loads(pickle.dumps(DATA._rows))
    np.testing.assert_array_equal(examples.at(3)["source"], DATA._rows.at(3)["source"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split is 'test'"),
        ({"packing": "tight"}, "packing is 'tight'"),
        ({"length": 0}, "length is 0"),
        ({"valid_fraction": 1.0}, "valid_fraction is 1.0"),
        ({"path": "nowhere.jsonl"}, "no text at 'nowhere.jsonl'"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Parallel(**change)
