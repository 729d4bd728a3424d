"""Regression: errors against numpy, and penalties against scikit-learn's own objectives."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.core import Mean
from lmjax.engine.program import compile_program
from lmjax.errors import UserError
from lmjax.models.mlp import mlp
from lmjax.ops.penalty import penalised_mean
from lmjax.sharding import Layout, unbox
from lmjax.tasks.classify import Classify
from lmjax.tasks.regress import Regress
from tests.tasks.sklearn_reference import ALPHA, RATIO, STORED, C, problem

X, VALUES, TWO, THREE, _ = problem()
N = len(X)


@pytest.fixture(scope="module")
def stored():
    with np.load(STORED) as arrays:
        return dict(arrays)


def batch_of(**targets):
    return {"features": X.astype("f4"), "weights": np.ones(N, "f4"), **targets}


def slopes(task, batch, kernel, bias):
    """The gradient of the mean that is descended, at these parameters: (of kernel, of bias)."""
    params = {"scores": {"kernel": jnp.asarray(kernel, "f4"), "bias": jnp.asarray(bias, "f4")}}

    def mean(params):
        return task.loss({"params": params}, batch, jax.random.key(0), train=True).loss.value

    found = jax.jit(jax.grad(mean))(params)["scores"]
    return np.asarray(found["kernel"]), np.asarray(found["bias"])


@pytest.mark.parametrize(
    ("name", "values", "penalties"),
    [
        ("ols", VALUES, {}),
        # Of two values the mean of both is descended, and scikit-learn sums them.
        ("ridge", VALUES, {"l2": ALPHA / 2}),
        ("lasso", VALUES[:, 0], {"l1": 2 * ALPHA}),
        ("elastic", VALUES[:, 0], {"l1": 2 * ALPHA * RATIO, "l2": ALPHA * (1 - RATIO)}),
    ],
)
def test_solution_of_sklearn_is_the_minimum(stored, name, values, penalties):
    """The objective is scikit-learn's: at its solution no way leads down."""
    kernel, bias = stored[f"{name}/kernel"], stored[f"{name}/bias"]
    task = Regress(model=mlp(num_outputs=kernel.shape[1]), **penalties)
    batch = batch_of(values=values.astype("f4"))
    at_kernel, at_bias = slopes(task, batch, kernel, bias)
    np.testing.assert_allclose(at_bias, 0, atol=1e-5)
    zero = np.abs(kernel) < 1e-9  # where |w| has a kink, whose slopes are from -l1 to l1
    np.testing.assert_allclose(at_kernel[~zero], 0, atol=1e-5)
    assert (np.abs(at_kernel[zero]) <= penalties.get("l1", 0.0)).all()
    elsewhere, _ = slopes(task, batch, kernel + 0.1, bias)
    assert np.abs(elsewhere).max() > 0.01


@pytest.mark.parametrize(
    ("name", "labels", "activation", "l2"),
    [
        ("logistic", TWO, "sigmoid", 1 / (2 * C * N)),
        ("multinomial", THREE, "softmax", 1 / (2 * C * N)),
    ],
)
def test_logistic_solution_of_sklearn_is_the_minimum(stored, name, labels, activation, l2):
    kernel, bias = stored[f"{name}/kernel"], stored[f"{name}/bias"]
    task = Classify(model=mlp(num_outputs=kernel.shape[1]), activation=activation, l2=l2)
    for slope in slopes(task, batch_of(labels=labels), kernel, bias):
        np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_two_outputs_share_the_penalty(stored):
    """Of two classes with an output each, the solution is half of it, and l2 twice as much."""
    kernel, bias = stored["logistic/kernel"] / 2, stored["logistic/bias"] / 2
    task = Classify(model=mlp(num_outputs=2), l2=1 / (C * N))
    both = [np.concatenate([-w, w], axis=-1) for w in (kernel, bias)]
    for slope in slopes(task, batch_of(labels=TWO), *both):
        np.testing.assert_allclose(slope, 0, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    ["huber", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mse", "mae"))],
)
def test_errors_by_hand(error):
    """Rows of weight 0 count in nothing; the reported loss has no penalty."""
    random = np.random.default_rng(1)
    weights = (random.random(N) < 0.7).astype("f4")
    batch = batch_of(values=VALUES.astype("f4")) | {"weights": weights}
    kernel, bias = random.normal(size=(4, 2)).astype("f4"), np.array([0.5, -1], "f4")
    task = Regress(model=mlp(num_outputs=2), error=error, delta=0.8, l1=0.1, l2=0.3)
    params = {"scores": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    loss = jax.jit(
        lambda params: task.loss({"params": params}, batch, jax.random.key(0), train=True)
    )
    found = loss(params)
    e = X @ kernel + bias - VALUES
    each = {
        "mse": e**2,
        "mae": abs(e),
        "huber": np.where(abs(e) < 0.8, e**2 / 2, 0.8 * (abs(e) - 0.4)),
    }[error].mean(1)
    want = (each * weights).sum() / weights.sum()
    np.testing.assert_allclose(found.metrics["loss"].value, want, rtol=1e-5)
    want += 0.1 * abs(kernel).sum() + 0.3 * (kernel**2).sum()
    np.testing.assert_allclose(found.loss.value, want, rtol=1e-5)
    told = task.predict({"params": params}, batch)
    np.testing.assert_allclose(told["scores_BC"], X @ kernel + bias, rtol=1e-4, atol=1e-5)


def test_penalties_add_over_microbatches():
    params = {"a": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([5.0])}}
    parts = [Mean(jnp.float32(6), jnp.float32(4)), Mean(jnp.float32(1), jnp.float32(2))]
    how = {"l1": 0.5, "l2": 0.25, "penalised": "kernel$"}
    found = [penalised_mean(part, params, **how) for part in parts]
    np.testing.assert_allclose((found[0] + found[1]).value, 7 / 6 + 0.5 * 3 + 0.25 * 5, rtol=1e-6)
    with pytest.raises(UserError, match=r"matches no parameter\. There are: a/bias, a/kernel"):
        penalised_mean(parts[0], params, l1=0.1, l2=0.0, penalised="scale")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"error": "hubber"}, "Did you mean 'huber'"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"l2": -1.0}, "l2 is -1.0: must be at least 0"),
        ({"penalised": "("}, "no regular expression"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        Regress(model=mlp(num_outputs=1), **fields)


@dataclass
class Rows:
    example: dict


def test_data_that_does_not_fit():
    features = jax.ShapeDtypeStruct((4,), "f4")
    labelled = Rows({"features": features, "labels": jax.ShapeDtypeStruct((), "i4")})
    valued = Rows({"features": features, "values": jax.ShapeDtypeStruct((2,), "f4")})
    with pytest.raises(UserError, match=r"Rows has no values.*kind='values'"):
        Regress(model=mlp(num_outputs=1)).check(labelled)
    with pytest.raises(UserError, match="1 outputs, and the data 2 values"):
        Regress(model=mlp(num_outputs=1)).check(valued)
    Regress(model=mlp(num_outputs=2)).check(valued)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ols", "ridge"])
def test_descent_finds_the_solution(stored, devices, name):
    """The engine's own steps on 8 devices end at scikit-learn's coefficients."""
    task = Regress(model=mlp(num_outputs=2), l2=ALPHA / 2 if name == "ridge" else 0.0)
    batch = {k: np.concatenate([v, np.zeros((4, *v.shape[1:]), v.dtype)]) for k, v in
             batch_of(values=VALUES.astype("f4")).items()}  # fmt: skip
    example = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batch.items()}
    program = compile_program(
        task, optax.sgd(0.3, momentum=0.8), Layout(data=8), example, batch_size=64, devices=devices
    )
    state = program.init()
    for _ in range(300):
        state, _ = program.train_step(state, program.put(batch))
    found = unbox(state.params)["scores"]
    for part in ("kernel", "bias"):
        np.testing.assert_allclose(found[part], stored[f"{name}/{part}"], rtol=1e-3, atol=1e-4)
