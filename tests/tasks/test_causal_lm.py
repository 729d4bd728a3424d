"""Next-token prediction: what is averaged over what, chunks, z-loss, and data that does not fit."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.models.gpt import gpt
from lmjax.ops.losses import logits
from lmjax.sharding import unbox
from lmjax.tasks.causal_lm import CausalLM

MODEL = gpt(num_layers=1, dim=16, num_heads=2, vocab_size=30, max_length=12, vocab_multiple=16)


@pytest.fixture(scope="module")
def variables():
    made = unbox(MODEL.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return jax.tree.map(lambda x: 5 * x, made)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(0, 30, (4, 12)).astype("i4"),
        "targets": random.integers(0, 30, (4, 12)).astype("i4"),
        "weights": random.integers(0, 2, (4, 12)).astype("f4"),
        "target_bytes": random.integers(1, 5, (4, 12)).astype("f4"),
    }


@functools.partial(jax.jit, static_argnames=("train", "vocab_chunk", "z_loss"))
def loss_of(variables, batch, *, train=False, **fields):
    task = CausalLM(model=MODEL, **fields)
    return task.loss(variables, batch, jax.random.key(0), train=train)


@jax.jit
def logits_of(variables, tokens):
    output = MODEL.apply(variables, tokens)
    return logits(output.hidden_BTD, output.unembedding)


def test_loss_and_bits_per_byte_by_hand(variables, batch):
    log_probs = jax.nn.log_softmax(logits_of(variables, batch["tokens"]))
    nll = -np.take_along_axis(np.asarray(log_probs), batch["targets"][..., None], -1)[..., 0]
    found = loss_of(variables, batch)
    total = (nll * batch["weights"]).sum()
    np.testing.assert_allclose(found.loss.value, total / batch["weights"].sum(), rtol=1e-5)
    num_bytes = (batch["target_bytes"] * batch["weights"]).sum()
    bits = total / math.log(2) / num_bytes
    np.testing.assert_allclose(found.metrics["bits_per_byte"].value, bits, rtol=1e-5)


def test_two_halves_add_up_to_the_whole(variables, batch):
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    first, second = (loss_of(variables, half).metrics for half in halves)
    whole = loss_of(variables, batch).metrics
    for name, mean in whole.items():
        np.testing.assert_allclose((first[name] + second[name]).value, mean.value, rtol=1e-5)


def test_targets_of_weight_zero_do_not_matter(variables, batch):
    other = {**batch, "targets": np.where(batch["weights"] > 0, batch["targets"], 7)}
    assert loss_of(variables, other).loss.value == loss_of(variables, batch).loss.value


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
def test_chunks_of_the_vocabulary_change_no_number(variables, batch, chunk):
    def value_and_gradient(vocab_chunk):
        def loss(v):
            found = loss_of(v, batch, vocab_chunk=vocab_chunk, z_loss=1e-2, train=True)
            return found.loss.value

        return jax.jit(jax.value_and_grad(loss))(variables)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        value_and_gradient(chunk),
        value_and_gradient(0),
    )


def test_z_loss_is_descended_and_not_reported(variables, batch):
    plain, with_z = loss_of(variables, batch), loss_of(variables, batch, z_loss=0.1, train=True)
    z = jax.nn.logsumexp(logits_of(variables, batch["tokens"]), axis=-1) ** 2
    expected = plain.loss.value + 0.1 * (z * batch["weights"]).sum() / batch["weights"].sum()
    np.testing.assert_allclose(with_z.loss.value, expected, rtol=1e-5)
    np.testing.assert_allclose(with_z.metrics["loss"].value, plain.loss.value, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """As much of a data set as `check` looks at."""

    length: int
    vocab_size: int

    @property
    def example(self):
        names = ("tokens", "targets", "weights")
        return {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in names}


class Pictures:
    example: ClassVar = {"images": jax.ShapeDtypeStruct((8, 8, 1), np.float32)}


def test_data_that_the_model_cannot_read_is_refused():
    task = CausalLM(model=MODEL)
    task.check(Shapes(length=12, vocab_size=30))
    with pytest.raises(UserError, match=r"data.length is 13, and the model.s max_length 12"):
        task.check(Shapes(length=13, vocab_size=30))
    with pytest.raises(UserError, match=r"a token beyond the vocabulary.*at least 31"):
        task.check(Shapes(length=12, vocab_size=31))
    with pytest.raises(UserError, match="has no targets, tokens, weights"):
        task.check(Pictures())
    with pytest.raises(UserError, match="neither may be negative"):
        CausalLM(model=MODEL, z_loss=-1.0)


def test_flop_counts_products_and_attention():
    """Of one token: 24 D^2 a layer, 4 T D for attention in full, 2 D V for logits."""
    work = CausalLM(model=MODEL).work(Shapes(length=12, vocab_size=30).example)
    full = 24 * 16**2 + 4 * 12 * 16 + 2 * 16 * 30
    causal = 24 * 16**2 + 4 * 16 * (12 + 1) / 2 + 2 * 16 * 30
    assert (work.unit, work.units) == ("tokens", 12)
    assert work.flop_full == pytest.approx(3 * 12 * full)
    assert work.flop == pytest.approx(3 * 12 * causal)
