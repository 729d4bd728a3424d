"""The compiled step: exact accumulation, frozen parameters, one compile, and what it refuses."""

import itertools

import jax
import numpy as np
import optax
import pytest

from lmjax.engine.program import compile_program, differences
from lmjax.engine.state import merge, split
from lmjax.errors import UserError
from lmjax.sharding import Layout
from tests.engine.linear_task import Linear, Points


def program_of(**options):
    options = {"batch_size": 16, "devices": jax.devices()[:1], **options}
    layout = options.pop("layout", Layout())
    optimizer = options.pop("optimizer", optax.sgd(0.1))
    return compile_program(Linear(), optimizer, layout, Points.example, **options)


def batches(count):
    return list(itertools.islice(Points().batches(batch_size=16, seed=3), count))


def run(program, count=3):
    state, rows = program.init(), []
    for batch in batches(count):
        state, metrics = program.train_step(state, program.put(batch))
        rows.append({name: float(mean.value) for name, mean in metrics.items()})
    return state, rows


def test_a_step_is_the_update_by_hand():
    program = program_of()
    state = program.init()
    kernel, offset = (np.asarray(state.params[k]) for k in ("kernel", "offset"))
    batch = batches(1)[0]
    error = batch["x"] @ kernel + offset - batch["y"]
    weights = batch["weights"] / batch["weights"].sum()
    state, metrics = program.train_step(state, program.put(batch))
    gradient = 2 * (weights * error) @ batch["x"], 2 * (weights * error).sum()
    np.testing.assert_allclose(state.params["kernel"], kernel - 0.1 * gradient[0], rtol=1e-5)
    np.testing.assert_allclose(state.params["offset"], offset - 0.1 * gradient[1], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, (weights * error**2).sum(), rtol=1e-5)
    norm = np.sqrt((gradient[0] ** 2).sum() + gradient[1] ** 2)
    np.testing.assert_allclose(metrics["grad_norm"].value, norm, rtol=1e-5)
    assert int(state.step) == 1


@pytest.mark.parametrize("microbatches", [2, 8, 16])
def test_accumulation_is_exact_though_weights_differ(microbatches):
    """A mean of means would differ: the microbatches weigh differently, and some weigh nothing."""
    state, rows = run(program_of(microbatches=microbatches))
    whole, expected = run(program_of())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, whole.params
    )
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    assert float(state.model_state["counts"]["batches"]) == 3 * microbatches
    assert float(whole.model_state["counts"]["batches"]) == 3


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(data=4, fsdp=2), Layout(slices=2, data=2, fsdp=2)], ids=str
)
def test_one_device_equals_eight(layout, devices):
    state, rows = run(program_of(layout=layout, devices=devices, microbatches=2))
    whole, expected = run(program_of())
    np.testing.assert_allclose(state.params["kernel"], whole.params["kernel"], rtol=1e-5)
    assert rows[-1] == pytest.approx(expected[-1], rel=1e-5)


def test_fsdp_shards_parameters_and_moments(devices):
    program = program_of(layout=Layout(data=4, fsdp=2), devices=devices, optimizer=optax.adam(0.1))
    state = program.init()
    for kernel in (state.params["kernel"], state.opt_state[0].mu["kernel"]):
        assert kernel.addressable_shards[0].data.shape == (1,)
    assert state.params["offset"].sharding.is_fully_replicated


def test_init_is_the_same_on_every_mesh(devices):
    one = program_of().init()
    many = program_of(layout=Layout(data=1, fsdp=2), devices=devices[:2]).init()
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_only_what_the_regex_names_trains():
    program = program_of(trainable="offset$", optimizer=optax.adam(0.1))
    before = program.init()
    kernel = np.asarray(before.frozen["kernel"])
    state, _ = run(program)
    assert state.params.keys() == {"offset"} and state.opt_state[0].mu.keys() == {"offset"}
    np.testing.assert_array_equal(state.frozen["kernel"], kernel)
    assert float(state.params["offset"]) != 0
    with pytest.raises(UserError, match="matches no parameter"):
        program_of(trainable="nothing")


def test_split_and_merge_are_inverse():
    params = {"a": {"b": 1, "c": 2}, "d": 3}
    parts = split(params, "a/b|d")
    assert parts == ({"a": {"b": 1}, "d": 3}, {"a": {"c": 2}})
    assert merge(*parts) == params


def test_other_arrays_stop_the_run_and_are_named(devices):
    program = program_of(devices=devices)
    state, batch = program.init(), batches(1)[0]
    small = {name: x[:8] for name, x in batch.items()}
    with pytest.raises(UserError, match=r"1/x: shape \(8, 2\), compiled for \(16, 2\)"):
        program.train_step(state, program.put(small))
    whole = program.put({**batch, "y": batch["y"].astype(np.float16)})
    with pytest.raises(UserError, match="1/y: dtype float16, compiled for float32"):
        program.train_step(state, whole)
    moved = {**program.put(batch), "x": jax.device_put(batch["x"], devices[3])}
    with pytest.raises(UserError, match="1/x: sharding"):
        program.train_step(state, moved)
    with pytest.raises(UserError, match="1/y: missing"):
        program.train_step(state, {k: v for k, v in program.put(batch).items() if k != "y"})
    program.train_step(state, program.put(batch))  # nothing was consumed on the way


def test_no_step_compiles_again():
    program = program_of()
    state = program.init()
    state, _ = program.train_step(state, program.put(batches(1)[0]))
    with jax.log_compiles(), jax.transfer_guard_device_to_device("disallow"):
        compiled: list = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
        )
        for batch in batches(5):
            state, _ = program.train_step(state, program.put(batch))
    assert compiled == []


def test_a_consumed_state_is_refused(devices):
    program = program_of(devices=devices)
    state, batch = program.init(), program.put(batches(1)[0])
    program.train_step(state, batch)
    with pytest.raises(ValueError, match="consumed by an earlier train_step"):
        program.train_step(state, batch)


def test_a_batch_that_does_not_divide_is_refused(devices):
    with pytest.raises(UserError, match="nearest that do: 8 or 16"):
        program_of(batch_size=12, devices=devices)
    program = program_of(devices=devices)
    with pytest.raises(UserError, match="12 rows do not divide into 8"):
        program.put({name: x[:12] for name, x in batches(1)[0].items()})


def test_evaluation_is_training_without_the_update():
    program = program_of()
    state, batch = program.init(), program.put(batches(1)[0])
    metrics = program.eval_step(state.variables(), batch)
    _, trained = program.train_step(state, batch)
    assert float(metrics["loss"].value) == pytest.approx(float(trained["loss"].value), rel=1e-6)


def test_differences_of_equal_trees_are_none():
    tree = {"a": np.zeros((2, 3))}
    assert differences(tree, tree) == []
