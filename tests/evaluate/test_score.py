"""Scores in batches are those of each span alone, whatever it is batched, padded or split with."""

import jax
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.evaluate import score
from lmjax.evaluate.score import FEW, Scorer, Span, bucket, rows_of
from tests.evaluate import toy


@pytest.fixture(scope="module")
def spans():
    """Of all lengths and numbers of scored tokens; some share their inputs."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(40):
        size = int(random.integers(2, 42))
        tokens = random.integers(0, 257, size).astype(np.int32)
        found.append(Span(tokens, int(random.integers(1, size))))
        for last in random.integers(0, 257, random.integers(0, 4)):
            other = np.append(tokens[:-1], last).astype(np.int32)
            found.append(Span(other, int(random.integers(1, min(size, 4)))))
    return [found[i] for i in random.permutation(len(found))]


def expected(spans):
    weights = toy.variables()
    rows = []
    for span in spans:
        size = len(span.tokens)
        every = [toy.logprobs(weights, span.tokens[:i]) for i in range(size - span.scored, size)]
        targets = span.tokens[-span.scored :]
        rows.append(
            (
                [one[target] for one, target in zip(every, targets, strict=True)],
                [one.argmax() == target for one, target in zip(every, targets, strict=True)],
            )
        )
    return rows


@pytest.mark.parametrize(("batch_size", "num_devices"), [(1, 1), (8, 1), (6, 4)])
def test_scores_are_those_of_each_span_alone(monkeypatch, devices, spans, batch_size, num_devices):
    monkeypatch.setattr(score, "LOGITS_BYTES", 4 * 257 * 8 * 5)  # five tokens at a time
    scorer = Scorer(
        toy.Toy(), toy.variables(), batch_size=batch_size, devices=devices[:num_devices]
    )
    assert scorer.rows == {1: 1, 8: 8, 6: 8}[batch_size]
    told = []
    found = scorer.score(spans, progress=told.append)
    assert sum(told) == len(spans)
    for one, (logprobs, likeliest) in zip(found, expected(spans), strict=True):
        np.testing.assert_allclose(one.logprobs, logprobs, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(one.likeliest, likeliest)


def test_the_likeliest_token_is_called_so():
    scorer = Scorer(toy.Toy(), toy.variables(), batch_size=2, devices=jax.devices()[:1])
    context = np.array([5, 6, 7], np.int32)
    best = int(toy.logprobs(toy.variables(), context).argmax())
    (found,) = scorer.score([Span(np.append(context, np.int32(best)), 1)])
    assert found.likeliest.tolist() == [True]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_span_is_in_one_row_of_one_batch(spans, batch_size):
    batches = list(rows_of(spans, batch_size))
    rows = [row for batch in batches for row in batch]
    assert sorted(n for row in rows for n in row.spans) == list(range(len(spans)))
    assert max(map(len, batches)) == batch_size
    for batch in batches:
        assert len({row.slots > FEW for row in batch}) == 1
        lengths = [len(row.inputs) for row in batch]
        assert lengths == sorted(lengths, reverse=True)
    for row in rows:
        assert row.slots == sum(spans[n].scored for n in row.spans)
        assert row.slots <= FEW or len(row.spans) == 1
        for number in row.spans:
            np.testing.assert_array_equal(spans[number].tokens[:-1], row.inputs)
    assert len(rows) < len(spans)  # some do share


def test_buckets():
    sizes = {bucket(n, 300) for n in range(1, 301)}
    assert sizes == {32, 48, 64, 96, 128, 192, 256, 300}
    assert all(n <= bucket(n, 300) for n in range(1, 301))
    assert bucket(33, 300) == 48 and bucket(20, 24) == 24


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(UserError, match="batch_size is 0"):
        Scorer(toy.Toy(), toy.variables(), batch_size=0)
    scorer = Scorer(toy.Toy(), toy.variables(), devices=jax.devices()[:1])
    with pytest.raises(UserError, match="gives token 257, and the model knows 257"):
        scorer.score([Span(np.array([1, 257], np.int32), 1)])
