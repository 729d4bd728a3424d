"""What rows carry from a batch to the next: repeated, split, cut and kept as the batch's rows."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.core import CARRY
from lmjax.engine.loop import train
from lmjax.engine.program import compile_program
from lmjax.engine.stored import variables
from lmjax.sharding import Layout
from tests.engine.linear_task import Linear, Points, make_run


@dataclasses.dataclass(frozen=True)
class Remembering(Linear):
    """Predicts from what a row has seen so far, half of it forgotten at each step."""

    def init(self, rng, batch):
        rows = len(batch["x"])
        return {**super().init(rng, batch), CARRY: {"seen": jnp.zeros((rows, 2))}}

    def loss(self, variables, batch, rng, *, train):
        seen = variables[CARRY]["seen"] if train else jnp.zeros_like(batch["x"])
        seen = 0.5 * seen + batch["x"]
        output = super().loss(variables, {**batch, "x": seen}, rng, train=train)
        if not train:
            return output
        return dataclasses.replace(
            output, model_state={**output.model_state, CARRY: {"seen": seen}}
        )


def run(count=3, **options):
    options = {"batch_size": 16, "devices": jax.devices()[:1], **options}
    layout = options.pop("layout", Layout())
    program = compile_program(Remembering(), optax.sgd(0.1), layout, Points.example, **options)
    state, losses = program.init(), []
    for batch in itertools.islice(Points().batches(batch_size=16, seed=3), count):
        state, metrics = program.train_step(state, program.put(batch))
        losses.append(float(metrics["loss"].value))
    return program, state, losses


def by_hand(count=3):
    seen = np.zeros((16, 2))
    for batch in itertools.islice(Points().batches(batch_size=16, seed=3), count):
        seen = 0.5 * seen + batch["x"]
    return seen


def test_rows_carry_their_own_state():
    program, state, _ = run()
    np.testing.assert_allclose(state.model_state[CARRY]["seen"], by_hand(), rtol=1e-6)
    assert float(state.model_state["counts"]["batches"]) == 3
    assert CARRY not in state.variables()  # an evaluation has other rows, and starts from nothing
    batch = next(Points().batches(batch_size=8, seed=3))
    error = batch["x"] @ np.asarray(state.params["kernel"]) + float(state.params["offset"])
    expected = batch["weights"] @ (error - batch["y"]) ** 2 / batch["weights"].sum()
    found = program.eval_step(state.variables(), program.put(batch))["loss"].value
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"microbatches": 4}, marks=pytest.mark.slow),
        {"layout": Layout(data=4, fsdp=2), "devices": 8, "microbatches": 2},
        pytest.param(
            {"layout": Layout(slices=2, data=2, fsdp=2), "devices": 8}, marks=pytest.mark.slow
        ),
    ],
    ids=["microbatched", "split and microbatched", "slices"],
)
def test_cut_and_split_it_is_the_same(options):
    if "devices" in options:
        options = {**options, "devices": jax.devices()[: options["devices"]]}
    _, expected, losses = run()
    program, state, found = run(**options)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, expected.params
    )
    seen = state.model_state[CARRY]["seen"]
    np.testing.assert_allclose(seen, by_hand(), rtol=1e-6)
    assert seen.sharding.is_equivalent_to(
        program.put(next(Points().batches(batch_size=16, seed=0)))["x"].sharding, 2
    )


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path):
    """3 + 3 steps are 6, bit for bit."""
    options = {"devices": jax.devices()[:2], "quiet": True}
    fields = {"task": Remembering(), "steps": 6, "save_every": 3}
    whole = train(make_run(**fields), tmp_path / "whole", **options)
    train(make_run(**{**fields, "steps": 3}), tmp_path / "parts", **options)
    parts = train(make_run(**fields), tmp_path / "parts", **options)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert np.abs(np.asarray(whole.model_state[CARRY]["seen"])).max() > 0


def test_inference_does_not_read_it():
    paths = ["params/kernel", "model_state/counts/batches", f"model_state/{CARRY}/seen"]
    assert sorted(variables(paths)) == ["counts/batches", "params/kernel"]
