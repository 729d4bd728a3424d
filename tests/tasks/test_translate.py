"""Translation: smoothed and plain loss by hand, packed = apart, and data that does not fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.parallel import Parallel
from lmjax.data.text import Text
from lmjax.data.vocabulary import Bytes
from lmjax.engine.program import compile_program
from lmjax.errors import UserError
from lmjax.models.gpt import gpt
from lmjax.models.t5 import t5
from lmjax.models.transformer import transformer
from lmjax.ops.losses import logits
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import noam
from lmjax.sharding import Layout, unbox
from lmjax.tasks.translate import Translate, shifted

DATA = Parallel(length=160, source_length=40, vocabulary=Bytes(), valid_fraction=0.2)
TRANSFORMER = transformer(
    size="nano", dim=16, hidden=24, num_heads=2, vocab_size=257, max_length=160, start_id=256
)
T5 = t5(num_layers=1, dim=16, num_heads=2, head_dim=8, hidden=24, vocab_size=257, max_length=160)


@functools.cache
def variables_of(model):
    made = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.2 * random.normal(size=x.shape)).astype("f4"), made)


@functools.partial(jax.jit, static_argnames=("model", "train", "smoothing"))
def loss_of(model, batch, *, train=False, smoothing=0.1):
    task = Translate(model=model, label_smoothing=smoothing)
    return task.loss(variables_of(model), batch, jax.random.key(0), train=train)


def a_batch(size=4):
    return {k: jnp.asarray(v) for k, v in next(DATA.epoch_batches(batch_size=size)).items()}


def test_targets_come_one_later_after_the_start():
    targets = jnp.array([[5, 6, 7, 8, 9, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(shifted(targets, None, 3), [[3, 5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(shifted(targets, positions, 3), [[3, 5, 6, 3, 8, 3]])


def test_loss_by_hand_and_smoothed_where_it_trains():
    """The model without dropout, so that training differs by its labels alone."""
    model = dataclasses.replace(TRANSFORMER, dropout=0.0)
    quiet = [stack.block.clone(dropout=0.0) for stack in (model.encoder, model.decoder)]
    model = model.clone(
        encoder=model.encoder.clone(block=quiet[0]), decoder=model.decoder.clone(block=quiet[1])
    )
    batch = a_batch()

    @jax.jit
    def scores(variables):
        output = model.apply(
            variables,
            shifted(batch["targets"], batch["positions"], 256),
            source_BM=batch["source"],
            positions_BT=batch["positions"],
            segments_BT=batch["segments"],
            source_positions_BM=batch["source_positions"],
            source_segments_BM=batch["source_segments"],
        )
        return jax.nn.log_softmax(logits(output.hidden_BTD, output.unembedding)[..., :257])

    log_p = np.asarray(scores(variables_of(model)))
    label = np.take_along_axis(log_p, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    weights = np.asarray(batch["weights"])
    plain = -(label * weights).sum() / weights.sum()
    smooth = -((0.9 * label + 0.1 * log_p.mean(-1)) * weights).sum() / weights.sum()
    evaluated, trained = loss_of(model, batch), loss_of(model, batch, train=True)
    np.testing.assert_allclose(evaluated.loss.value, plain, rtol=1e-5)
    np.testing.assert_allclose(trained.metrics["loss"].value, plain, rtol=1e-5)
    np.testing.assert_allclose(trained.loss.value, smooth, rtol=1e-5)


@pytest.mark.parametrize(
    "model", [TRANSFORMER, pytest.param(T5, marks=pytest.mark.slow)], ids=["transformer", "t5"]
)
def test_packed_pairs_are_pairs_apart(model):
    """The loss of some rows is that of their pairs, a row each, padded to the same lengths."""
    batch = a_batch(2)
    packed = loss_of(model, batch).loss
    rows = []
    for row in range(2):
        for pair in range(1, int(batch["segments"][row].max()) + 1):
            alone = {name: np.zeros_like(x[row]) for name, x in batch.items()}
            for prefix, ids in (("source_", "source"), ("", "targets")):
                own = np.asarray(batch[f"{prefix}segments"][row]) == pair
                alone[ids][: own.sum()] = np.asarray(batch[ids][row])[own]
                alone[f"{prefix}segments"][: own.sum()] = 1
                alone[f"{prefix}positions"][: own.sum()] = np.arange(own.sum())
            alone["weights"] = (alone["segments"] > 0).astype("f4")
            rows.append(alone)
    assert len(rows) > 4
    apart = loss_of(model, {name: np.stack([r[name] for r in rows]) for name in rows[0]}).loss
    np.testing.assert_allclose(packed.weight, apart.weight)
    np.testing.assert_allclose(packed.value, apart.value, rtol=1e-5)


@pytest.mark.slow
def test_rows_of_zeros_do_not_matter():
    """Rows that complete a batch, and padding: no NaN comes of tokens that see nothing."""
    batch = a_batch(2)
    more = {k: jnp.concatenate([v, jnp.zeros_like(v)]) for k, v in batch.items()}
    task, key = Translate(model=T5), jax.random.key(0)
    gradient = jax.jit(jax.grad(lambda v: task.loss(v, more, key, train=True).loss.total))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(variables_of(T5))))
    np.testing.assert_allclose(
        loss_of(T5, more).loss.value, loss_of(T5, batch).loss.value, rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", [TRANSFORMER, T5], ids=["transformer", "t5"])
def test_trains(model):
    """One batch over and over; a T5 by the same task."""
    program = compile_program(
        Translate(model=model),
        adamw(learning_rate=noam(dim=16, warmup_steps=4, scale=0.05)),
        Layout(),
        DATA.example,
        batch_size=4,
        devices=jax.devices()[:1],
    )
    state, batch = program.init(), program.put(a_batch())
    losses = []
    for _ in range(20):
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["loss"].value))
    assert losses[-1] < 0.9 * losses[0]


def test_work_is_three_forward_passes():
    work = Translate(model=TRANSFORMER).work(DATA.example)
    causal, full = TRANSFORMER.flop(40, 160)
    assert (work.unit, work.units, work.flop, work.flop_full) == (
        "tokens",
        160,
        3 * causal,
        3 * full,
    )


def test_what_does_not_fit_is_refused():
    task = Translate(model=TRANSFORMER)
    task.check(DATA)
    for data, message in (
        (dataclasses.replace(DATA, length=161), "data.length is 161"),
        (dataclasses.replace(DATA, source_length=161), "data.source_length is 161"),
        (Text(path=__file__, vocabulary=Bytes()), "the data has no source"),
    ):
        with pytest.raises(UserError, match=message):
            task.check(data)
    small = transformer(size="nano", vocab_size=256, max_length=200)
    with pytest.raises(UserError, match="vocab_size to at least 257"):
        Translate(model=small).check(DATA)
    with pytest.raises(UserError, match="the model reads no source"):
        Translate(model=gpt(num_layers=1, dim=8, num_heads=1, vocab_size=9, max_length=4))
    for change, message in (
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"z_loss": -1.0}, "z_loss -1.0"),
    ):
        with pytest.raises(UserError, match=message):
            Translate(model=TRANSFORMER, **change)
