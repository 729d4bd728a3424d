"""FLOP read from traced programs against counts by hand and against the models' own."""

import jax
import jax.numpy as jnp
import pytest

from lmjax.config import build, load_config
from lmjax.engine.run import draft_run
from lmjax.plan.flop import executed, largest

PRODUCT = 2.0 * 3 * 4 * 5


def count(function, *shapes):
    parts = executed(jax.make_jaxpr(function)(*(jnp.zeros(s) for s in shapes)))
    return sum(sum(when.values()) for when in parts.values())


def test_products_and_loops():
    assert count(jnp.dot, (3, 4), (4, 5)) == PRODUCT
    assert count(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (7, 3, 4), (7, 4, 5)) == 7 * PRODUCT

    def loop(x, w):
        return jax.lax.scan(lambda c, _: (c, c @ w), x, None, length=6)

    assert count(loop, (3, 4), (4, 5)) == 6 * PRODUCT

    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((3, 5)))

    assert count(either, (3, 4), (4, 5)) == PRODUCT


def test_grouped_products_and_convolutions():
    def grouped(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([1, 2], jnp.int32))

    assert count(grouped, (3, 4), (2, 4, 5)) == PRODUCT

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), "VALID")

    assert count(convolve, (2, 4, 10), (6, 4, 3)) == 2 * (2 * 6 * 8) * (4 * 3)


def test_largest():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sum(jnp.outer(x, x) * 2))(jnp.zeros(100, jnp.float32))
    size, shape, _ = largest(jaxpr, 1)[0]
    assert (size, shape) == (40_000, "float32[100,100]")


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_does_what_the_model_says(remat, devices):
    """Forward and backward are the model's FLOP with full attention; 'full' adds another forward.

    The last product of each block is not needed again, nor are the logits.
    """
    config = load_config(
        "configs/gpt2.py:smoke", {"task.model.remat": remat, "task.vocab_chunk": "0"}
    )
    run = build(config)
    work = run.task.work(run.data.example)
    parts = executed(draft_run(run, devices=devices).jaxpr)
    assert set(parts) == {
        "attention", "attention/qkv", "attention/out", "mlp/up", "mlp/down", "logits",
    }  # fmt: skip
    padded = run.task.model.embed.num_rows / run.task.model.embed.vocab_size
    parts["logits"] = {when: flop / padded for when, flop in parts["logits"].items()}
    model = sum(when["forward"] + when["backward"] for when in parts.values())
    assert model == pytest.approx(run.batch_size * work.flop_full, rel=1e-6)
    again = {part for part, when in parts.items() if when["recomputed"]}
    wanted = {"attention", "attention/qkv", "attention/out", "mlp/up"} if remat == "full" else set()
    assert again == wanted
    for part in wanted:
        assert parts[part]["recomputed"] == parts[part]["forward"]
