"""Prediction of masked tokens: the loss by hand, what it averages over, data that does not fit."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.models.bert import bert
from lmjax.ops.losses import logits
from lmjax.sharding import unbox
from lmjax.tasks.masked_lm import MaskedLM
from tests.models import bert_reference
from tests.models.bert_reference import from_torch_names
from tests.models.test_families import same_gradients, variables_of

SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "vocab_size": 30, "max_length": 12}
MODEL = bert(**SIZE, pooler=False, token_head=True, dropout=0.0, vocab_multiple=16)


@pytest.fixture(scope="module")
def variables():
    made = unbox(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.3 * random.standard_normal(x.shape, np.float32), made)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(0, 30, (4, 12)).astype("i4"),
        "targets": random.integers(0, 30, (4, 12)).astype("i4"),
        "weights": random.integers(0, 2, (4, 12)).astype("f4"),
        "segments": np.sort(random.integers(0, 3, (4, 12)), axis=1).astype("i4"),
        "positions": random.integers(0, 12, (4, 12)).astype("i4"),
    }


@functools.partial(jax.jit, static_argnames=("train", "vocab_chunk"))
def loss_of(variables, batch, *, train=False, vocab_chunk=0):
    task = MaskedLM(model=MODEL, vocab_chunk=vocab_chunk)
    return task.loss(variables, batch, jax.random.key(0), train=train)


@pytest.fixture(scope="module")
def log_probs(variables, batch):
    @jax.jit
    def scores(variables, batch):
        output = MODEL.apply(
            variables,
            batch["tokens"],
            segments_BT=batch["segments"],
            positions_BT=batch["positions"],
        )
        return logits(output.predicting_BTD, output.unembedding)

    return np.asarray(jax.nn.log_softmax(scores(variables, batch)))


def test_loss_and_accuracy_by_hand(variables, batch, log_probs):
    found, w = loss_of(variables, batch), batch["weights"]
    nll = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(found.loss.value, (nll * w).sum() / w.sum(), rtol=1e-5)
    best = {**batch, "targets": log_probs.argmax(-1).astype("i4")}
    best["targets"][0] = (best["targets"][0] + 1) % 30
    expected = w[1:].sum() / w.sum()
    np.testing.assert_allclose(loss_of(variables, best).metrics["accuracy"].value, expected)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [7, 16])
def test_chunks_of_the_vocabulary_change_no_number(variables, batch, log_probs, chunk):
    whole = loss_of(variables, batch)
    best = {**batch, "targets": log_probs.argmax(-1).astype("i4")}
    parts = loss_of(variables, best, vocab_chunk=chunk)
    np.testing.assert_array_equal(parts.metrics["accuracy"].value, 1.0)
    other = loss_of(variables, batch, vocab_chunk=chunk)
    np.testing.assert_allclose(other.loss.value, whole.loss.value, rtol=1e-6)


@pytest.mark.slow
def test_halves_add_up_and_what_is_not_chosen_does_not_matter(variables, batch):
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    first, second = (loss_of(variables, half).metrics for half in halves)
    whole = loss_of(variables, batch).metrics
    for name, mean in whole.items():
        np.testing.assert_allclose((first[name] + second[name]).value, mean.value, rtol=1e-5)
    other = {**batch, "targets": np.where(batch["weights"] > 0, batch["targets"], 7)}
    assert loss_of(variables, other).loss.value == loss_of(variables, batch).loss.value
    assert "accuracy" not in loss_of(variables, batch, train=True).metrics


def test_data_and_models_that_do_not_fit_are_refused(variables, batch):
    def shapes(length, vocab_size):
        example = {"tokens": jax.ShapeDtypeStruct((length,), np.int32)}
        return types.SimpleNamespace(example=example, vocab_size=vocab_size, masked_fraction=0.15)

    task = MaskedLM(model=MODEL)
    task.check(shapes(12, 30))
    with pytest.raises(UserError, match=r"data.length is 13, and the model.s max_length 12"):
        task.check(shapes(13, 30))
    with pytest.raises(UserError, match="set it to at least 31"):
        task.check(shapes(12, 31))
    with pytest.raises(UserError, match="nothing is masked in SimpleNamespace"):
        task.check(types.SimpleNamespace(example={}))
    headless = MaskedLM(model=bert(**SIZE))
    with pytest.raises(UserError, match="token_head to True"):
        jax.eval_shape(
            lambda: headless.loss(
                headless.init(jax.random.key(0), batch), batch, jax.random.key(0), train=False
            )
        )
    with pytest.raises(UserError, match="must not be negative"):
        MaskedLM(model=MODEL, vocab_chunk=-1)


def test_flop_counts_products_and_whole_attention():
    """Of one token: 24 D^2 a layer, 4 T D for attention, 2 D (D + V) for the head."""
    work = MaskedLM(model=MODEL).work({"tokens": jax.ShapeDtypeStruct((12,), np.int32)})
    expected = 3 * 12 * (24 * 16**2 + 4 * 12 * 16 + 2 * 16 * (16 + 30))
    assert (work.unit, work.units, work.flop, work.flop_full) == ("tokens", 12, expected, expected)


@pytest.mark.slow
def test_loss_and_gradients_equal_live_transformers():
    """BertForMaskedLM with labels of -100 where nothing is to be predicted, on whole rows."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertForMaskedLM(transformers.BertConfig(**bert_reference.SIZES))
    named = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(bert_reference.weight(name, parameter.shape)))
    rows = {k: x[:2] for k, x in bert_reference.rows().items()}
    labels = torch.as_tensor(np.where(rows["weights"] > 0, rows["targets"], -100))
    expected = reference(torch.as_tensor(rows["tokens"]), labels=labels).loss
    expected.backward()
    model = bert(
        num_layers=3,
        dim=32,
        num_heads=4,
        hidden=40,
        vocab_size=37,
        max_length=28,
        pooler=False,
        token_head=True,
        dropout=0.0,
    )
    weights, gradients = (
        from_torch_names({k: np.asarray(x) for k, x in arrays.items()}, num_heads=4)
        for arrays in (
            {k: p.detach() for k, p in named.items()},
            {k: p.grad for k, p in named.items()},
        )
    )
    batch = {k: jnp.asarray(rows[k]) for k in ("tokens", "targets", "weights")}

    def loss(variables, chunk):
        task = MaskedLM(model=model, vocab_chunk=chunk)
        return task.loss(variables, batch, jax.random.key(0), train=True).loss.value

    for chunk in (0, 10):
        made = jax.jit(jax.value_and_grad(functools.partial(loss, chunk=chunk)))
        found, ours = made(variables_of(weights))
        np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
        same_gradients(ours["params"], gradients, atol=1e-4)
