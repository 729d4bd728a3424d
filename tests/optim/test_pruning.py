"""Pruning: masks against numpy, the schedule, what stays zero, meshes and resumes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.config import build_and_resolve, load_config
from lmjax.engine.loop import train
from lmjax.engine.run import compile_run
from lmjax.errors import UserError
from lmjax.optim.pruning import (
    axes_of,
    cubic,
    keep_largest,
    keep_pattern,
    keep_towards,
    pruned,
)
from lmjax.sharding import Boxed, Layout
from tests.test_configs import Failing

RNG = np.random.default_rng(0)


def params():
    return {
        "up": {
            "kernel": Boxed(jnp.asarray(RNG.normal(size=(3, 8, 6))), ("layers", "embed", "mlp"))
        },
        "out": {"kernel": Boxed(jnp.asarray(RNG.normal(size=(4, 2, 6))), ("heads", None, "embed"))},
        "norm": {"scale": Boxed(jnp.ones(6), ("norm",))},
    }


def plain(tree):
    return jax.tree.map(
        lambda x: x.value if isinstance(x, Boxed) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Boxed),
    )


def run(optimizer, start, steps):
    state, values = plain(jax.jit(optimizer.init)(start)), plain(start)

    @jax.jit
    def step(gradient, state, values):
        updates, state = optimizer.update(gradient, state, values)
        return optax.apply_updates(values, updates), state

    for _ in range(steps):
        gradient = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype("f4"), values)
        values, state = step(gradient, state, values)
        yield values, state


def test_axes_of_kernels():
    assert axes_of(("layers", "embed", "kv_heads", None, "head_dim")) == ((0,), (1,))
    assert axes_of(("layers", "heads", "head_dim", "embed")) == ((0,), (1, 2))
    assert axes_of(("layers", "experts", "mlp", "embed")) == ((0, 1), (2,))
    assert axes_of(("embed", "mlp")) == ((), (0,))


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_largest_equal_those_of_numpy(scope):
    scores = {"a": RNG.random((3, 8, 6)).astype("f4"), "b": RNG.random((10,)).astype("f4")}
    found = keep_largest(scores, 0.7, stacked={"a": (0,), "b": ()}, scope=scope)
    joined = np.sort(np.concatenate([x.ravel() for x in scores.values()]))
    for name, x in scores.items():
        for one, kept in zip(x, found[name], strict=True) if name == "a" else [(x, found[name])]:
            own = np.sort(one.ravel()) if scope == "matrix" else joined
            np.testing.assert_array_equal(kept, one > own[int(0.7 * len(own) + 1e-6) - 1])


@pytest.mark.parametrize("pattern", [(2, 4), pytest.param((4, 8), marks=pytest.mark.slow)])
def test_pattern_keeps_the_largest_of_each_group(pattern):
    n, m = pattern
    score = RNG.random((3, 4, 4, 5))
    found = np.asarray(keep_pattern(score, pattern, axes=(1, 2)))
    for layer, column in itertools.product(range(3), range(5)):
        x, kept = score[layer, ..., column].ravel(), found[layer, ..., column].ravel()
        for at in range(0, 16, m):
            best = np.sort(np.argsort(x[at : at + m])[-n:])
            np.testing.assert_array_equal(np.flatnonzero(kept[at : at + m]), best)


def test_schedule_is_zhu_and_guptas():
    for step, share in ((0, 0.0), (10, 0.0), (60, 0.9 * 0.875), (110, 0.9), (500, 0.9)):
        np.testing.assert_allclose(cubic(step, sparsity=0.9, begin=10, end=110), share, rtol=1e-6)


def test_zeros_grow_and_stay():
    optimizer = pruned(optimizer=optax.adam(0.1), sparsity=0.5, begin=2, end=6, every=2)
    before, shares = None, []
    for values, state in run(optimizer, params(), 9):
        kernel = np.asarray(values["up"]["kernel"])
        zeros = kernel == 0
        np.testing.assert_array_equal(zeros, np.asarray(state.masks["up"]["kernel"].kept) == 0)
        if before is not None:
            assert not np.any(before & ~zeros)
        before = zeros
        shares.append(zeros.mean((1, 2)).tolist())
        assert np.all(values["norm"]["scale"] != 0)
    at_4 = np.floor(48 * 0.5 * 0.875) / 48
    wanted = [0, 0, 0, at_4, at_4, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(shares, [[x] * 3 for x in wanted])


def test_two_of_four_along_the_inputs():
    optimizer = pruned(optimizer=optax.sgd(0.1), pattern="2:4", begin=1)
    values, state = list(run(optimizer, params(), 3))[-1]
    assert state.masks["out"]["kernel"].inputs == (0, 1)
    up = np.asarray(values["up"]["kernel"]).reshape(3, 2, 4, 6)
    out = np.asarray(values["out"]["kernel"]).reshape(2, 4, 6)
    assert np.all((up != 0).sum(2) == 2) and np.all((out != 0).sum(1) == 2)


def test_a_pattern_grows_by_zhu_and_guptas_share():
    """Each choice against numpy: the smallest of what the pattern would drop; at last it alone."""
    optimizer = pruned(optimizer=optax.sgd(0.1), pattern="2:4", begin=1, end=6, every=2, where="up")
    start = params()
    state, values = plain(jax.jit(optimizer.init)(start)), plain(start)
    update = jax.jit(optimizer.update)
    kept, random = np.ones((3, 8, 6)), np.random.default_rng(3)
    for step in range(1, 9):
        gradient = jax.tree.map(lambda x: random.normal(size=x.shape).astype("f4"), values)
        moved = np.asarray(values["up"]["kernel"]) - 0.1 * gradient["up"]["kernel"]
        updates, state = update(gradient, state, values)
        values = optax.apply_updates(values, updates)
        if step in (1, 3, 5, 6):
            score = np.abs(moved) * kept
            rank = np.argsort(np.argsort(-score.reshape(3, 2, 4, 6), axis=2), axis=2)
            spared = (rank < 2).reshape(3, 8, 6)
            number = int(48 * 0.5 * (1 - (1 - (step - 1) / 5) ** 3) + 1e-6)
            for layer in range(3):
                out = np.sort(score[layer][~spared[layer]])[:number]
                kept[layer] = spared[layer] | (score[layer] > (out[-1] if number else -1))
        np.testing.assert_array_equal(np.asarray(values["up"]["kernel"]) != 0, kept)
    assert np.all(kept.reshape(3, 2, 4, 6).sum(2) == 2)


@pytest.mark.parametrize("pattern", [(2, 3), pytest.param((1, 4), marks=pytest.mark.slow)])
def test_towards_a_pattern_never_passes_it(pattern):
    """Whatever the share, even one that rounding has made too large."""
    scores = {"a": jnp.asarray(RNG.random((12, 5)), jnp.float32)}

    @jax.jit
    def masks(share):
        spared = {"a": keep_pattern(scores["a"], pattern, axes=(0,))}
        return spared, keep_towards(spared, scores, share, stacked={"a": ()}, scope="matrix")

    for share in (0.0, 0.2, 1 - pattern[0] / pattern[1], 0.9):
        spared, found = (np.asarray(x["a"]) for x in masks(share))
        assert not np.any(spared & ~found)
        most = 60 - int(spared.sum())
        assert 60 - int(found.sum()) == min(most, int(60 * share + 1e-3))


def test_weights_that_are_pruned_already_stay_so():
    start = params()
    first = start["up"]["kernel"]
    start["up"]["kernel"] = first.replace_boxed(first.value.at[:, ::2].set(0))
    values, _ = list(run(pruned(optimizer=optax.adam(0.1), keep_zeros=True), start, 2))[-1]
    kernel = np.asarray(values["up"]["kernel"])
    assert np.all(kernel[:, ::2] == 0) and np.all(kernel[:, 1::2] != 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0, "end": 5}, "below 1"),
        ({"sparsity": 0.5, "end": 0}, "end must"),
        ({}, "give one of them"),
        ({"sparsity": 0.5, "end": 5, "pattern": "2:4"}, "give one of them"),
        ({"pattern": "4:2"}, "as '2:4'"),
        ({"pattern": "2:4", "begin": 5, "end": 4}, "end must"),
        ({"sparsity": 0.5, "end": 5, "scope": "all"}, "scope"),
        ({"sparsity": 0.5, "end": 5, "where": "("}, "where"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        pruned(optimizer=optax.sgd(0.1), **fields)


def test_refused_when_it_starts():
    with pytest.raises(UserError, match="no parameter that trains"):
        pruned(optimizer=optax.sgd(0.1), pattern="2:4", where="nothing").init(params())
    with pytest.raises(UserError, match="3:5 does not divide"):
        pruned(optimizer=optax.sgd(0.1), pattern="3:5").init(params())


@pytest.fixture(scope="module", params=[{"sparsity": 0.5}, {"pattern": "2:4"}])
def small(request):
    run, tree = build_and_resolve(load_config("configs/char.py:smoke"))
    optimizer = pruned(optimizer=run.optimizer, begin=1, end=4, every=1, **request.param)
    return dataclasses.replace(run, optimizer=optimizer, evals={}, steps=4, save_every=2), tree


@pytest.mark.slow
def test_one_device_equals_eight(small):
    found = []
    for layout, devices in ((Layout(), 1), (Layout(data=2, fsdp=2, tensor=2), 8)):
        run = dataclasses.replace(small[0], layout=layout)
        program = compile_run(run, devices=jax.devices()[:devices])
        state, losses = program.init(), []
        batches = run.data.batches(batch_size=run.batch_size, seed=run.seed)
        for batch in itertools.islice(batches, 4):
            state, metrics = program.train_step(state, program.put(batch))
            losses.append(float(metrics["loss"].value))
        share = np.mean(np.asarray(state.params["blocks"]["block"]["mlp"]["up"]["kernel"]) == 0)
        assert share == 0.5
        found.append(losses)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(small, tmp_path):
    run, tree = small
    options = {"config": tree, "devices": jax.devices()[:2], "quiet": True}
    whole = train(run, tmp_path / "whole", **options)
    failing = dataclasses.replace(run, data=Failing(run.data, last=3))
    with pytest.raises(OSError, match="the disk is gone"):
        train(failing, tmp_path / "torn", **options)
    resumed = train(run, tmp_path / "torn", **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
