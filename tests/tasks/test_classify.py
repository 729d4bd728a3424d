"""Classification: losses against sums in numpy, weights, smoothing, and data that does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lmjax.core import NetworkOutput
from lmjax.errors import UserError
from lmjax.tasks.classify import Classify, classes, num_classes

ROWS = 7


class Scores(nn.Module):
    """Takes the values out of the batch, times a parameter that is 1, and counts its calls."""

    num_outputs: int

    def check(self, data):
        pass

    @nn.compact
    def __call__(self, batch, *, train=False):
        scale = self.param("scale", nn.initializers.ones, ())
        seen = self.variable("batch_stats", "seen", lambda: jnp.zeros(()))
        if train:
            seen.value += 1
        return NetworkOutput(scale * batch["features"][:, : self.num_outputs])

    def flop(self, example):
        return 10.0

    def count_params(self, params):
        return {"scale": 1}


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "features": 3 * random.standard_normal((ROWS, 3), np.float32),
        "labels": random.integers(0, 3, ROWS).astype("i4"),
        "weights": np.array([1, 1, 0, 1, 1, 1, 0], np.float32),
    }


def result(batch, *, train=True, **fields):
    task = Classify(**fields)
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    return jax.jit(lambda v: task.loss(v, batch, jax.random.key(0), train=train))(variables)


def log_softmax(values):
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def test_softmax_by_hand(batch):
    found = result(batch, model=Scores(3))
    logs = log_softmax(batch["features"].astype("f8"))
    nll = -logs[np.arange(ROWS), batch["labels"]]
    w = batch["weights"]
    np.testing.assert_allclose(found.loss.value, (nll * w).sum() / w.sum(), rtol=1e-6)
    right = (logs.argmax(-1) == batch["labels"]) * w
    np.testing.assert_allclose(found.metrics["accuracy"].value, right.sum() / w.sum(), rtol=1e-6)


def test_weights_and_smoothing_are_descended_and_not_reported(batch):
    """As torch's CrossEntropyLoss(weight=..., label_smoothing=...) defines its mean."""
    names, by_name = ("a", "b", "c"), {"c": 4.0, "a": 0.5}
    found = result(
        batch, model=Scores(3), classes=names, class_weights=by_name, label_smoothing=0.2
    )
    logs = log_softmax(batch["features"].astype("f8"))
    target = 0.8 * np.eye(3)[batch["labels"]] + 0.2 / 3
    each = -(target * np.array([0.5, 1, 4]) * logs).sum(-1)
    w = batch["weights"]
    divisor = (w * np.array([0.5, 1, 4])[batch["labels"]]).sum()
    np.testing.assert_allclose(found.loss.value, (each * w).sum() / divisor, rtol=1e-6)
    plain = result(batch, model=Scores(3))
    np.testing.assert_array_equal(found.metrics["loss"].value, plain.loss.value)


def test_penalties_are_descended_and_not_reported(batch):
    """The one parameter is 1."""
    found = result(batch, model=Scores(3), l1=0.5, l2=0.25, penalised="scale")
    plain = result(batch, model=Scores(3))
    np.testing.assert_allclose(found.loss.value, plain.loss.value + 0.75, rtol=1e-6)
    np.testing.assert_array_equal(found.metrics["loss"].value, plain.loss.value)


def test_sigmoid_of_two_classes_by_hand(batch):
    batch = {**batch, "labels": batch["labels"] % 2}
    names = ("no", "yes")
    found = result(
        batch, model=Scores(1), activation="sigmoid", classes=names, class_weights={"yes": 3.0}
    )
    p = 1 / (1 + np.exp(-batch["features"][:, 0].astype("f8")))
    each = -np.log(np.where(batch["labels"] == 1, p, 1 - p))
    w = batch["weights"] * np.where(batch["labels"] == 1, 3, 1)
    np.testing.assert_allclose(found.loss.value, (each * w).sum() / w.sum(), rtol=1e-6)
    right = ((p > 0.5) == batch["labels"]) * batch["weights"]
    expected = right.sum() / batch["weights"].sum()
    np.testing.assert_allclose(found.metrics["accuracy"].value, expected, rtol=1e-6)


def test_sigmoid_of_several_that_may_hold(batch):
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, (ROWS, 3)).astype("f4")
    found = result(
        {**batch, "labels": labels},
        model=Scores(3),
        activation="sigmoid",
        classes=("a", "b", "c"),
        class_weights={"b": 5.0},
        label_smoothing=0.1,
    )
    p = 1 / (1 + np.exp(-batch["features"].astype("f8")))
    y, w = 0.9 * labels + 0.05, batch["weights"]
    each = -(np.array([1, 5, 1]) * y * np.log(p) + (1 - y) * np.log(1 - p)).mean(-1)
    np.testing.assert_allclose(found.loss.value, (each * w).sum() / w.sum(), rtol=1e-6)
    right = ((p > 0.5) == (labels > 0)).mean(-1)
    expected = (right * w).sum() / w.sum()
    np.testing.assert_allclose(found.metrics["accuracy"].value, expected, rtol=1e-6)


def test_halves_add_up_and_state_changes_in_training_alone(batch):
    fields = {"model": Scores(3), "classes": ("a", "b", "c"), "train": False}
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 7))]
    first, second = (result(half, **fields).metrics for half in halves)
    whole = result(batch, **fields)
    for name, mean in whole.metrics.items():
        np.testing.assert_allclose((first[name] + second[name]).value, mean.value, rtol=1e-6)
    kept = (batch["labels"] == 1) & (batch["weights"] > 0)
    right = batch["features"].argmax(-1)[kept] == 1
    np.testing.assert_allclose(whole.metrics["recall/b"].value, right.mean(), rtol=1e-6)
    assert "batch_stats" not in whole.model_state
    assert float(result(batch, model=Scores(3)).model_state["batch_stats"]["seen"]) == 1


def test_predict_gives_probabilities_of_every_class(batch):
    task = Classify(model=Scores(1), activation="sigmoid")
    variables = task.init(jax.random.key(0), batch)
    found = task.predict(variables, {"features": batch["features"], "weights": batch["weights"]})
    p = 1 / (1 + np.exp(-batch["features"][:, 0]))
    np.testing.assert_allclose(found["scores_BC"], np.stack([1 - p, p], 1), rtol=1e-5, atol=1e-7)
    assert sorted(found) == ["scores_BC", "weights_B"]
    task = Classify(model=Scores(3))
    found = task.predict(task.init(jax.random.key(0), batch), batch)
    np.testing.assert_allclose(
        found["scores_BC"], np.exp(log_softmax(batch["features"])), rtol=1e-5
    )
    np.testing.assert_array_equal(found["labels_B"], batch["labels"])


@dataclasses.dataclass(frozen=True)
class Labelled:
    """As much of a data set as `check` looks at."""

    classes: tuple[str, ...]
    shape: tuple[int, ...] = ()

    @property
    def example(self):
        return {"labels": jax.ShapeDtypeStruct(self.shape, np.int32)}


def test_data_that_the_outputs_are_not_for_is_refused():
    task, data = Classify(model=Scores(3)), Labelled(("a", "b", "c"))
    task.check(data)
    assert (classes(data), num_classes(data)) == (("a", "b", "c"), 3)
    with pytest.raises(UserError, match="3 outputs, and softmax of these 2 classes needs 2"):
        task.check(Labelled(("a", "b")))
    with pytest.raises(UserError, match=r"classes \['a'\]: give at least two"):
        task.check(Labelled(("a",)))
    with pytest.raises(UserError, match="set activation='sigmoid'"):
        task.check(Labelled(("a", "b", "c"), shape=(3,)))
    with pytest.raises(UserError, match="is for two classes, and the data has 3"):
        Classify(model=Scores(1), activation="sigmoid").check(data)
    with pytest.raises(UserError, match="in their order"):
        Classify(model=Scores(3), classes=("b", "a", "c")).check(data)
    with pytest.raises(UserError, match="object has no labels"):
        task.check(object())
    with pytest.raises(UserError, match=r"'posi', which is no class\. Did you mean 'pos'"):
        Classify(model=Scores(2), classes=("neg", "pos"), class_weights={"posi": 2.0})
    with pytest.raises(UserError, match="must be above 0"):
        Classify(model=Scores(2), classes=("neg", "pos"), class_weights={"pos": 0.0})
    with pytest.raises(UserError, match="give both"):
        Classify(model=Scores(2), class_weights={"pos": 2.0})
    with pytest.raises(UserError, match="at least 0 and below 1"):
        Classify(model=Scores(2), label_smoothing=1.0)
    with pytest.raises(UserError, match="Did you mean 'softmax'"):
        Classify(model=Scores(2), activation="sofmax")
