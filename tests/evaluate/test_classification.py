"""Evaluators by row: on what a session predicts, whole whatever the devices, and as a picture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.core import Mean, Output, Work
from lmjax.data.table import Table, validation
from lmjax.engine.program import compile_program
from lmjax.engine.session import RunSession
from lmjax.errors import UserError
from lmjax.evaluate import metrics
from lmjax.evaluate.classification import Classification, Regression, draw_confusion, predictions
from lmjax.sharding import Boxed, Layout
from tests.engine.linear_task import Linear, Points

PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Told:
    """Says what the batch's features say, times a parameter that is 1."""

    target: str

    def init(self, rng, batch):
        return {"params": {"one": Boxed(jnp.ones(()), ())}}

    def loss(self, variables, batch, rng, *, train):
        return Output(loss=Mean.of(batch["weights"] * variables["params"]["one"]), metrics={})

    def check(self, data):
        pass

    def work(self, example):
        return Work(unit="examples", units=1, flop=0.0, flop_full=0.0)

    def count_params(self, params):
        return {}

    def predict(self, variables, batch):
        scores = batch["features"] * variables["params"]["one"]
        suffix = "BC" if batch[self.target].ndim == 2 else "B"
        return {
            "scores_BC": scores,
            f"{self.target}_{suffix}": batch[self.target],
            "weights_B": batch["weights"],
        }


@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays, in order."""

    arrays: dict
    classes: tuple = ()
    fitted = {}  # noqa: RUF012, nothing changes it

    @property
    def example(self):
        return {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in self.arrays.items()}

    def check(self):
        pass

    def epoch_batches(self, *, batch_size, shard=0, num_shards=1):
        for start in range(0, len(self.arrays["weights"]), batch_size):
            part = {k: v[start : start + batch_size] for k, v in self.arrays.items()}
            short = batch_size - len(part["weights"])
            yield {
                k: np.concatenate([v, np.zeros((short, *v.shape[1:]), v.dtype)])
                for k, v in part.items()
            }


def session_of(data, target, devices, workdir=None):
    task = Told(target)
    program = compile_program(
        task, optax.sgd(0.1), Layout(data=len(devices)), data.example, batch_size=8, devices=devices
    )
    return RunSession(
        task=task, data=data, seed=0, program=program, state=program.init(), workdir=workdir
    )


@pytest.fixture(scope="module")
def drawn():
    random = np.random.default_rng(0)
    return {
        "features": random.dirichlet(np.ones(3), 30).astype("f4"),
        "labels": random.integers(0, 3, 30).astype("i4"),
        "weights": np.ones(30, "f4"),
    }


@pytest.mark.parametrize("ways", [1, 8])
def test_classification(drawn, devices, tmp_path, ways):
    """Every row once, in order; rows that complete a batch count in nothing."""
    data = Rows(drawn, classes=("a", "b", "c"))
    session = session_of(data, "labels", devices[:ways], tmp_path)
    told = predictions(session, data, batch_size=8)
    np.testing.assert_array_equal(told["scores_BC"], drawn["features"])
    np.testing.assert_array_equal(told["labels_B"], drawn["labels"])
    found = Classification(data=data, batch_size=8)(session)
    taken = drawn["features"].argmax(1)
    counts = metrics.confusion(drawn["labels"], taken, 3)
    assert found["accuracy"] == pytest.approx((taken == drawn["labels"]).mean())
    assert found["macro_f1"] == pytest.approx(metrics.macro_f1(counts))
    assert found["auc"] == metrics.auc_one_vs_rest(drawn["labels"], drawn["features"])
    assert found["recall/b"] == pytest.approx(counts[1, 1] / counts[1].sum())
    assert found["precision/c"] == pytest.approx(counts[2, 2] / counts[:, 2].sum())
    assert (tmp_path / "confusion.png").read_bytes().startswith(PNG)


def test_several_labels_and_values(drawn, devices):
    random = np.random.default_rng(1)
    holds = (random.random((30, 3)) < 0.4).astype("f4")
    data = Rows(drawn | {"labels": holds}, classes=("a", "b", "c"))
    session = session_of(data, "labels", devices[:1])
    found = Classification(data=data, batch_size=8)(session)
    yes = drawn["features"] > 0.5
    assert found["accuracy"] == pytest.approx((yes == holds).mean())
    assert found["recall/a"] == pytest.approx((yes * holds)[:, 0].sum() / holds[:, 0].sum())
    areas = [metrics.auc(h, s) for h, s in zip(holds.T, drawn["features"].T, strict=True)]
    assert found["auc"] == pytest.approx(np.mean(areas))

    values = random.normal(size=(30, 3)).astype("f4")
    data = Rows({k: v for k, v in drawn.items() if k != "labels"} | {"values": values})
    found = Regression(data=data, batch_size=8)(session_of(data, "values", devices[:1]))
    want = metrics.regression_errors(values, drawn["features"])
    assert found == pytest.approx(want)


def test_what_it_cannot_run_on(drawn):
    data = Rows(drawn, classes=("a", "b", "c"))
    task = Told("labels")
    Classification(data=data, batch_size=8).check(task, data, ways=8)
    with pytest.raises(UserError, match="does not divide into 8"):
        Classification(data=data, batch_size=12).check(task, data, ways=8)
    with pytest.raises(UserError, match="are not the training's"):
        Classification(data=data, batch_size=8).check(task, Rows(drawn, ("a", "b", "d")), ways=8)
    with pytest.raises(UserError, match="has no values to compare with"):
        Regression(data=data, batch_size=8).check(task, data, ways=8)
    with pytest.raises(UserError, match="Linear says nothing of single rows"):
        Classification(data=data, batch_size=8).check(Linear(), data, ways=8)
    with pytest.raises(UserError, match="without folders"):
        Classification(data=data, batch_size=8, picture="a/b")
    table = Table(path="made:germancredit", target="creditability")
    other = Table(path="made:germancredit", target="creditability", scaling="minmax")
    with pytest.raises(UserError, match="has another columns"):
        held_out = validation(other)
        Classification(data=held_out, batch_size=8).check(task, table, ways=8)


def test_a_task_that_predicts_nothing(devices):
    points = Points()
    program = compile_program(
        Linear(), optax.sgd(0.1), Layout(), points.example, batch_size=8, devices=devices[:1]
    )
    session = RunSession(task=Linear(), data=points, seed=0, program=program, state=program.init())
    with pytest.raises(UserError, match="Linear says nothing of single rows"):
        session.predict(next(points.batches(batch_size=8, seed=0)))
    session.keep("nowhere.txt", b"a session without a folder keeps nothing")


@pytest.mark.slow
def test_picture_of_many_classes():
    counts = np.arange(100 * 100).reshape(100, 100)
    assert draw_confusion(counts, [f"class {i}" for i in range(100)]).startswith(PNG)
