"""Networks of tables and of short texts against numpy, and on 8 devices."""

import itertools

import jax
import numpy as np
import pytest

from lmjax.core import Task
from lmjax.data.table import Table
from lmjax.data.vocabulary import BPE
from lmjax.engine.program import compile_program
from lmjax.errors import UserError
from lmjax.models.bert import bert
from lmjax.models.classifier import classifier
from lmjax.models.lstm import lstm
from lmjax.models.mlp import mlp
from lmjax.models.short_text import bag, flat
from lmjax.ops.activations import ACTIVATIONS
from lmjax.sharding import Layout, unbox
from lmjax.tasks.classify import Classify

OTHERS = sorted(ACTIVATIONS.keys() - {"swiglu"})
TEXT = {"num_outputs": 3, "vocab_size": 20, "max_length": 6}


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 7, 5)
    return {
        "tokens": random.integers(0, 20, (5, 6)).astype("i4"),
        "segments": (np.arange(6) < lengths[:, None]).astype("i4"),
    }


def params_of(model, batch):
    """Every parameter drawn anew, so that none is zero."""
    tree = unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype("f4"), tree)


def by_name(name, x):
    sigmoid = 1 / (1 + np.exp(-x))
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return {
        "sigmoid": sigmoid,
        "relu": np.maximum(x, 0),
        "tanh": np.tanh(x),
        "gelu": 0.5 * x * (1 + tanh),
        "swiglu": x * sigmoid,
    }[name]


def layer(params, x, name):
    if name == "swiglu":
        gate = by_name(name, affine(params["gate"], x))
        return gate * affine(params["up"], x)
    return by_name(name, affine(params["dense"], x))


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


@pytest.mark.parametrize(
    "name", ["swiglu", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_mlp_by_hand(name):
    random = np.random.default_rng(2)
    batch = {
        "features": random.normal(size=(5, 4)).astype("f4"),
        "categories": np.stack([random.integers(0, 3, 5), random.integers(3, 7, 5)], 1).astype(
            "i4"
        ),
    }
    model = mlp(num_outputs=2, hidden=(6, 8), num_categories=7, activation=name)
    params = params_of(model, batch)
    found = model.apply({"params": params}, batch).values_BC
    ones = np.eye(7)[batch["categories"]].sum(1)
    x = np.concatenate([batch["features"], ones], 1)
    for i in range(2):
        x = layer(params[f"hidden_{i}"], x, name)
    np.testing.assert_allclose(found, affine(params["scores"], x), rtol=1e-4, atol=1e-4)
    assert sum(model.count_params(params).values()) == sum(x.size for x in jax.tree.leaves(params))
    factor = 4 if name == "swiglu" else 2
    spec = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batch.items()}
    assert model.flop(spec) == factor * (11 * 6 + 6 * 8) + 2 * 8 * 2


def test_embedded_categories_by_hand():
    batch = {"categories": np.array([[0, 4], [2, 3]], "i4")}
    model = mlp(num_outputs=2, num_categories=5, category_dim=3)
    params = params_of(model, batch)
    assert params["table"]["table"].shape == (8, 3)
    assert model.count_params(params)["table"] == 15
    x = params["table"]["table"][batch["categories"]].reshape(2, 6)
    found = model.apply({"params": params}, batch).values_BC
    np.testing.assert_allclose(found, affine(params["scores"], x), rtol=1e-5)


@pytest.mark.parametrize("joining", ["flat", "mean"])
def test_short_text_by_hand(texts, joining):
    """What pads a row counts in nothing: other tokens there give the same."""
    make = flat if joining == "flat" else bag
    model = make(dim=4, hidden=(5,), activation="sigmoid", **TEXT)
    params = params_of(model, texts)
    found = model.apply({"params": params}, texts).values_BC
    real = texts["segments"][..., None]
    x = params["embed"]["table"][texts["tokens"]] * real
    x = x.reshape(5, -1) if joining == "flat" else x.sum(1) / real.sum(1)
    x = layer(params["hidden_0"], x, "sigmoid")
    np.testing.assert_allclose(found, affine(params["scores"], x), rtol=1e-4, atol=1e-4)
    changed = texts | {"tokens": np.where(texts["segments"] > 0, texts["tokens"], 7)}
    np.testing.assert_array_equal(model.apply({"params": params}, changed).values_BC, found)
    assert model.count_params(params)["embed"] == 80
    spec = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in texts.items()}
    assert model.flop(spec) == 2 * (24 if joining == "flat" else 4) * 5 + 2 * 5 * 3


def test_data_that_does_not_fit(texts):
    class Rows:
        example = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in texts.items()}  # noqa: RUF012, nothing changes it
        vocab_size = 21

    with pytest.raises(UserError, match="21 tokens, and the model's vocab_size is 20"):
        bag(**TEXT).check(Rows())
    with pytest.raises(UserError, match="must be one number"):
        flat(**TEXT | {"max_length": 7}).check(Rows())
    with pytest.raises(UserError, match="lower the first"):
        bag(**TEXT | {"max_length": 5}).check(Rows())
    with pytest.raises(UserError, match="reads features and categories, and Rows has tokens"):
        mlp(num_outputs=1).check(Rows())
    table = Table(path="made:germancredit", target="creditability")
    with pytest.raises(UserError, match="11 categories, and the model's num_categories is 3"):
        mlp(num_outputs=1, num_categories=3).check(table)
    with pytest.raises(UserError, match="reads text, and Table has features"):
        bag(**TEXT).check(table)
    for make, fields, message in [
        (mlp, {"num_outputs": 0}, "num_outputs is 0"),
        (mlp, {"num_outputs": 1, "activation": "rely"}, "Did you mean 'relu'"),
        (mlp, {"num_outputs": 1, "init": "xavier"}, "Did you mean 'xavier_"),
        (mlp, {"num_outputs": 1, "dropout": 1.0}, "dropout is 1.0"),
        (bag, TEXT | {"dim": 0}, "dim is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            make(**fields)


SMALL = {"vocab_size": 300, "max_length": 16}
NETWORKS = {
    "flat": lambda: flat(num_outputs=6, dim=8, hidden=(16,), **SMALL),
    "bag": lambda: bag(num_outputs=6, dim=8, hidden=(16, 8), activation="swiglu", **SMALL),
    "lstm": lambda: classifier(
        encoder=lstm(dim=8, units=8, vocab_multiple=8, **SMALL), num_outputs=6, pooling="last",
        dropout=0.0,
    ),
    "transformer": lambda: classifier(
        encoder=bert(
            num_layers=1, dim=16, num_heads=2, pooler=False, dropout=0.0, vocab_multiple=8, **SMALL
        ),
        num_outputs=6, dropout=0.0,
    ),
    "mlp": lambda: mlp(num_outputs=6, num_categories=8, category_dim=8, hidden=(16, 8)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_one_device_equals_eight(devices, name):
    import optax

    columns = (
        {"categorical": ("channel", "plan"), "numeric": ("months",)}
        if name == "mlp"
        else {"text": ("message",), "vocabulary": BPE(vocab_size=300), "length": 16}
    )
    table = Table(path="made:tickets", target="topic", **columns)
    task = Classify(model=NETWORKS[name](), l1=1e-4, l2=1e-3)
    task.check(table)
    assert isinstance(task, Task)
    batches = list(itertools.islice(table.batches(batch_size=16, seed=0), 3))
    found = []
    for layout, some in ((Layout(), devices[:1]), (Layout(data=2, fsdp=2, tensor=2), devices)):
        program = compile_program(
            task, optax.adam(1e-2), layout, table.example, batch_size=16, devices=some
        )
        state, losses = program.init(), []
        for batch in batches:
            state, metrics = program.train_step(state, program.put(batch))
            losses.append(float(metrics["loss"].value))
        scores = program.predict(state.variables(), program.put(batches[0]))["scores_BC"]
        found.append((losses, np.asarray(scores)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)
