"""Drawing a token: which tokens, how often, and the same whatever else is drawn beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.errors import UserError
from lmjax.generate import sample as module
from lmjax.generate.sample import Sampling, filtered, penalised, sample
from lmjax.sharding import Layout

SETTINGS = {
    "temperature": {"temperature": 2.0},
    "top_k": {"top_k": 3},
    "large top_k": {"top_k": 30},
    "top_k beyond the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "little top_p": {"top_p": 0.01},
    "min_p": {"min_p": 0.3},
    "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "hot": {"temperature": 5.0, "top_k": 35, "top_p": 0.99, "min_p": 0.01},
    "greedy": {"temperature": 0.0, "top_k": 4, "top_p": 0.5},
}
V = 40


def plain(logits_V, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities to draw one row with, token by token."""
    if temperature == 0:
        return np.eye(len(logits_V))[np.argmax(logits_V)]
    order = np.argsort(-logits_V)
    if top_k:
        order = order[:top_k]
    probs = np.exp((logits_V[order] - logits_V[order[0]]) / temperature)
    probs /= probs.sum()
    kept, mass = [], 0.0
    for token, p in zip(order, probs, strict=True):
        if mass >= top_p and kept:
            break
        mass += p
        if p >= min_p * probs[0]:
            kept.append((token, p))
    found = np.zeros(len(logits_V))
    for token, p in kept:
        found[token] = p / sum(p for _, p in kept)
    return found


@pytest.fixture(scope="module")
def draw():
    """Settings, logits [V], keys -> a token for each key."""

    @jax.jit
    def run(logits_V, keys, how):
        return sample(jnp.tile(logits_V, (len(keys), 1)), keys, how)

    return lambda logits_V, keys, **settings: run(logits_V, keys, Sampling(**settings).arrays())


def logits_of(seed):
    return np.random.default_rng(seed).normal(size=V).astype(np.float32) * 2


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frequencies_are_the_probabilities(draw, settings):
    expected = plain(logits_of(0), **settings)
    keys = jax.random.split(jax.random.key(1), 4000)
    found = np.bincount(draw(logits_of(0), keys, **settings), minlength=V) / len(keys)
    # Four standard deviations of a frequency over 4,000 draws are under 0.032.
    np.testing.assert_allclose(found, expected, atol=0.032)
    assert np.all(found[expected == 0] == 0)


def test_allowed_tokens_are_the_plain_ones():
    run = jax.jit(filtered)
    for seed in range(20):
        for settings in SETTINGS.values():
            if settings.get("temperature") == 0:
                continue
            how = Sampling(**settings)
            scaled = logits_of(seed)[None] / how.temperature
            found = jnp.isfinite(run(scaled, how.arrays()))[0]
            assert (found == (plain(logits_of(seed), **settings) > 0)).all(), (seed, settings)


def test_few_candidates_give_what_all_tokens_give(monkeypatch):
    """Where all that may be drawn is among the candidates, and where it is not."""
    logits = np.stack([logits_of(seed) for seed in range(64)])
    keys = jax.random.split(jax.random.key(2), 64)

    def drawn():
        run = jax.jit(lambda how: sample(logits, keys, how))
        return [run(Sampling(**settings).arrays()).tolist() for settings in SETTINGS.values()]

    everything = drawn()
    monkeypatch.setattr(module, "CANDIDATES", 8)
    assert drawn() == everything


def test_logits_that_devices_share_are_drawn_alike(devices):
    """The vocabulary is split as the output layer splits it."""
    random = np.random.default_rng(0)
    x_BD = random.standard_normal((4, 8)).astype(np.float32)
    w_DV = random.standard_normal((8, 4096)).astype(np.float32)
    keys, how = jax.random.split(jax.random.key(5), 4), Sampling(temperature=1.0, top_k=40).arrays()
    run = jax.jit(lambda w_DV: sample(x_BD @ w_DV, keys, how))
    halves = NamedSharding(Layout(tensor=2).mesh(devices[:2]), PartitionSpec(None, "tensor"))
    assert run(jax.device_put(w_DV, halves)).tolist() == run(w_DV).tolist()


def test_a_row_is_drawn_as_it_is_alone():
    logits = np.stack([logits_of(seed) for seed in range(8)])
    keys = jax.random.split(jax.random.key(3), 8)
    run, how = jax.jit(sample), Sampling(temperature=1.5, top_p=0.9).arrays()
    together = run(logits, keys, how)
    alone = [int(run(logits[i : i + 1], keys[i : i + 1], how)[0]) for i in range(8)]
    assert together.tolist() == alone
    assert run(logits, keys[::-1], how).tolist() != alone


def test_padding_is_never_drawn(draw):
    logits = np.where(np.arange(V) < 3, logits_of(4), -np.inf).astype(np.float32)
    keys = jax.random.split(jax.random.key(4), 500)
    assert set(np.asarray(draw(logits, keys)).tolist()) == {0, 1, 2}
    assert set(np.asarray(draw(logits, keys, top_k=10, top_p=0.999)).tolist()) <= {0, 1, 2}


def test_repetition_penalty_makes_seen_tokens_less_likely():
    logits = jnp.array([[2.0, -2.0, 3.0, -1.0], [2.0, -2.0, 3.0, -1.0]])
    seen = jnp.array([[True, True, False, False], [False, False, False, False]])
    expected = [[1.0, -4.0, 3.0, -1.0], [2.0, -2.0, 3.0, -1.0]]
    np.testing.assert_array_equal(penalised(logits, seen, jnp.float32(2.0)), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, r"top_k is -1: must be 0 \(all\)"),
        ({"top_p": 0.0}, "top_p is 0.0: must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0: must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
