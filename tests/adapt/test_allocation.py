"""AdaLoRA's half of the optimizer against a few lines of numpy, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.adapt.allocation import adalora
from lmjax.errors import UserError
from lmjax.optim.presets import average_params

STEPS, EVERY, WARMUP, FINAL, TARGET = 14, 2, 3, 4, 2


def params_of(seed):
    """Two stacked layers of one product, and one product alone."""
    rng = np.random.default_rng(seed)

    def triplet(lead, ins, outs, rank=4):
        shapes = {"a": (*lead, *ins, rank), "values": (*lead, rank), "b": (*lead, rank, *outs)}
        return {k: (0.5 * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}

    stacked, other = triplet((2,), (5,), (2, 3)), triplet((), (2, 2), (3,))
    stacked = {f"query_{k}": x for k, x in stacked.items()}
    bias = rng.normal(size=3).astype(np.float32)
    return {"stack": {"adalora": stacked}, "one": {"adalora": other, "bias": bias}}


def matrices(params):
    """[{a [in, r], values [r], b [r, out]}]: of each layer, in float64 and by reference."""
    stacked, one = params["stack"]["adalora"], params["one"]["adalora"]
    found = [
        {
            "a": stacked["query_a"][i].astype(np.float64),
            "values": stacked["query_values"][i].astype(np.float64),
            "b": stacked["query_b"][i].reshape(4, 6).astype(np.float64),
        }
        for i in range(2)
    ]
    alone = {k: one[k].astype(np.float64) for k in ("values", "b")}
    return [*found, {"a": one["a"].reshape(4, 4).astype(np.float64), **alone}]


def by_hand(params, gradients, form):
    """Values of each matrix after each step, of SGD at 0.1."""
    own = matrices(params)
    mean = [{k: np.zeros_like(x) for k, x in m.items()} for m in own]
    spread = [{k: np.zeros_like(x) for k, x in m.items()} for m in own]
    found = []
    for step, given in enumerate(gradients, 1):
        slope = matrices(given)
        for m, g in zip(own, slope, strict=True):
            for kind, rows in (("a", m["a"].T), ("b", m["b"])):
                apart = rows @ rows.T - np.eye(4)
                more = 4 * apart @ rows  # of the squared norm
                if form == "peft":
                    more = more / (2 * np.linalg.norm(apart)) / 6
                g[kind] = g[kind] + 0.3 * (more.T if kind == "a" else more)
        before = [{k: x.copy() for k, x in m.items()} for m in own]
        for m, g in zip(own, slope, strict=True):
            for k in m:
                m[k] = m[k] - 0.1 * g[k]
        at = own if form == "peft" else before
        if step < STEPS - FINAL:
            for i, (m, g) in enumerate(zip(at, slope, strict=True)):
                for k in m:
                    now = abs(m[k] * g[k])
                    mean[i][k] = 0.8 * mean[i][k] + 0.2 * now
                    spread[i][k] = 0.7 * spread[i][k] + 0.3 * abs(now - mean[i][k])
        if step >= STEPS - FINAL:
            budget = TARGET * 3
        else:
            left = 1 - (step - WARMUP) / (STEPS - FINAL - WARMUP)
            budget = math.floor((12 - 6) * left**3 + 6)
        if (WARMUP < step < STEPS - FINAL and step % EVERY == 0) or step >= STEPS - FINAL:
            score = [{k: mean[i][k] * spread[i][k] for k in m} for i, m in enumerate(own)]
            total = [s["values"] + s["a"].mean(axis=0) + s["b"].mean(axis=1) for s in score]
            order = np.sort(np.concatenate(total))[::-1]
            for m, t in zip(own, total, strict=True):
                m["values"] = np.where(t >= order[budget - 1], m["values"], 0.0)
        found.append(np.stack([m["values"] for m in own]))
    return np.stack(found)


@pytest.mark.parametrize("form", ["paper", "peft"])
def test_values_are_pruned_as_the_paper_says(form):
    params, gradients = params_of(0), [params_of(seed) for seed in range(1, STEPS + 1)]
    optimizer = adalora(
        optimizer=optax.sgd(0.1),
        steps=STEPS,
        target_rank=TARGET,
        warmup_steps=WARMUP,
        final_steps=FINAL,
        every=EVERY,
        b1=0.8,
        b2=0.7,
        orthogonality=0.3,
        form=form,
    )

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        values = [params["stack"]["adalora"]["query_values"], params["one"]["adalora"]["values"]]
        return (params, state), (jnp.concatenate([values[0], values[1][None]]), state.ranks)

    all_gradients = jax.tree.map(lambda *xs: jnp.stack(xs), *gradients)
    start = jax.tree.map(jnp.asarray, params)
    run = jax.jit(lambda c, g: jax.lax.scan(step, c, g))
    (end, _), (values, ranks) = run((start, optimizer.init(start)), all_gradients)
    wanted = by_hand(params, gradients, form)
    np.testing.assert_allclose(values, wanted, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(values) == 0, wanted == 0)
    np.testing.assert_array_equal(ranks, (wanted != 0).sum(axis=(1, 2)))
    assert ranks[-1] == TARGET * 3
    bias = params["one"]["bias"] - 0.1 * sum(g["one"]["bias"] for g in gradients)
    np.testing.assert_allclose(end["one"]["bias"], bias, atol=1e-5)


def make(**changes):
    return adalora(**{"optimizer": optax.sgd(0.1), "steps": 10, "target_rank": 2} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 6, "final_steps": 4}, "must leave steps in which ranks are pruned"),
        ({"every": 0}, "every is 0"),
        ({"target_rank": 0}, "target_rank is 0"),
        ({"target_rank": 5}, "has a rank of 4: it starts above"),
        ({"b1": 1.0}, "b1 is 1.0"),
        ({"orthogonality": -1.0}, "orthogonality is -1.0"),
        ({"form": "pefd"}, "Did you mean 'peft'"),
        ({"name": "lora"}, "no parameter that trains is one of an adapter called 'lora'"),
        ({"optimizer": optax.chain(average_params(0.9))}, "averages the parameters"),
    ],
)
def test_what_makes_no_schedule_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes).init(jax.tree.map(jnp.asarray, params_of(0)))
