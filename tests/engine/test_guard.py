"""Bad steps: what is judged bad, that nothing of them is applied, and what each policy does."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.curves import read_metrics
from lmjax.engine.guard import Guard
from lmjax.engine.incidents import batch_of, batches_left_out, read_incidents
from lmjax.engine.loop import BadStep, train
from lmjax.engine.run import compile_run
from lmjax.errors import UserError
from tests.engine.linear_task import Points, make_run


@dataclasses.dataclass(frozen=True)
class Bad(Points):
    """Points whose batches of these numbers hold a NaN, or targets a thousand times as large."""

    nans: tuple[int, ...] = ()
    large: tuple[int, ...] = ()

    def batches(self, *, start=0, **arguments):
        for number, batch in enumerate(super().batches(start=start, **arguments), start):
            y = batch["y"].copy()
            if number in self.nans:
                y[0] = np.nan
            if number in self.large:
                y *= 1000
            yield {**batch, "y": y}


def options():
    return {"quiet": True, "devices": jax.devices()[:1]}


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r}


def judged(guard, pairs):
    """(applied, bad) for every (loss, norm) in turn."""
    memory, found = guard.start(), []
    for loss, norm in pairs:
        applied, bad, memory = guard.judge(memory, jnp.float32(loss), jnp.float32(norm))
        found.append((bool(applied), bool(bad)))
    return found


GOOD, BAD, HALTED = (True, False), (False, True), (False, False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_bad_and_halts_unless_skipped(value):
    pairs = [(1, 1), (1, value), (1, 1)]
    assert judged(Guard(), pairs) == [GOOD, BAD, HALTED]
    assert judged(Guard(policy="rollback"), pairs) == [GOOD, BAD, HALTED]
    assert judged(Guard(policy="skip"), pairs) == [GOOD, BAD, GOOD]
    assert judged(Guard(policy="skip"), [(value, 1), (1, 1)]) == [BAD, GOOD]


def test_a_spike_is_a_multiple_of_the_median_of_good_steps():
    guard = Guard(policy="skip", norm_spike=3.0, window=4)
    assert judged(guard, [(1, 1), (1, 100)]) == [GOOD, GOOD]  # too early to tell
    norms = [1, 2, 7, 3, 2, 5.9, 8.9, 1]  # medians: 1.5, 1.5 (7 is not in it), 2, 2, 2.5, ...
    found = judged(guard, [(1, norm) for norm in norms])
    assert found == [GOOD, GOOD, BAD, GOOD, GOOD, GOOD, BAD, GOOD]
    both = Guard(policy="skip", loss_spike=2.0, window=2)
    assert judged(both, [(1, 1), (2.1, 1), (1.9, 50)]) == [GOOD, BAD, GOOD]


def test_the_update_of_a_bad_step_is_not_applied():
    """Skipped, the run is that over the other batches; the state before is kept bit for bit."""
    run = make_run(data=Bad(nans=(2,)), guard=Guard(policy="skip"))
    program = compile_run(run, devices=jax.devices()[:1])

    def trained(numbers):
        state = program.init()
        batches = list(itertools.islice(run.data.batches(batch_size=16, seed=0), 5))
        for number in numbers:
            state, _ = program.train_step(state, program.put(batches[number]))
        return jax.device_get((state.params, state.opt_state, state.model_state))

    jax.tree.map(np.testing.assert_array_equal, trained([0, 1, 2, 3]), trained([0, 1, 3]))


def test_stop_keeps_the_state_before_the_step_for_a_replay(tmp_path):
    run = make_run(data=Bad(nans=(5,)), save_every=2)
    with pytest.raises(BadStep, match=r"step 6 is bad: the loss is nan .* lmjax.replay .*step=6"):
        train(run, tmp_path / "run", **options())
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2, 4]
    whole = train(make_run(steps=5), tmp_path / "five", **options())
    program = compile_run(run, devices=jax.devices()[:1])
    kept = Checkpoints(tmp_path / "run" / "incidents").restore(
        program.abstract_state, lambda _: None
    )
    assert kept[0] == 5
    jax.tree.map(np.testing.assert_array_equal, kept[1], whole)
    with np.load(tmp_path / "run" / "incidents" / "batch-6-0.npz") as rows:
        expected = next(run.data.batches(batch_size=16, seed=0, start=5))
        for name, value in expected.items():
            np.testing.assert_array_equal(rows[name], value)
    (line,) = read_incidents(tmp_path / "run")
    assert (line["step"], line["batch"], line["policy"]) == (6, 5, "stop")
    assert line["metrics"]["loss"] == "nan" and line["rng"] == {"seed": 0, "fold_in": 5}
    assert [row["step"] for row in line["recent"]] == [1, 2, 3, 4, 5]
    assert line["recent"][0]["loss"] == losses(tmp_path / "five")[1]


def test_skip_goes_on_and_counts(tmp_path, caplog):
    run = make_run(data=Bad(nans=(2, 6)), guard=Guard(policy="skip"))
    state = train(run, tmp_path, **options())
    assert int(state.step) == 10 and np.isfinite(state.params["kernel"]).all()
    assert [row["step"] for row in read_incidents(tmp_path)] == [3, 7]
    assert sorted(losses(tmp_path)) == [1, 2, 4, 5, 6, 8, 9, 10]
    assert "step 7 is bad" in caplog.text and "(2 so far)" in caplog.text
    run = make_run(data=Bad(nans=(2, 6, 7)), guard=Guard(policy="skip", limit=2))
    with pytest.raises(BadStep, match="It is bad step 3, and the limit is 2"):
        train(run, tmp_path / "limit", **options())


@pytest.mark.parametrize("first", [3, 5])  # before and after the first checkpoint
def test_rollback_leaves_the_batch_out(tmp_path, first, caplog):
    """The run is then, bit for bit, that over data without the batch; across a restart too."""
    guard = Guard(policy="rollback", norm_spike=20.0, window=4)
    run = make_run(data=Bad(large=(first, 8)), guard=guard)
    done = train(run, tmp_path / "run", **options())
    assert batches_left_out(tmp_path / "run") == {first, 8}
    assert "went back from step" in caplog.text

    class Without(Points):
        def batches(self, *, start=0, **arguments):
            every = enumerate(super().batches(start=0, **arguments))
            rest = (batch for number, batch in every if number not in (first, 8))
            return itertools.islice(rest, start, None)

    expected = train(make_run(data=Without(), guard=guard), tmp_path / "without", **options())
    jax.tree.map(np.testing.assert_array_equal, done, expected)
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    longer = dataclasses.replace(run, steps=12)
    train(longer, tmp_path / "run", **options())
    train(make_run(data=Without(), guard=guard, steps=12), tmp_path / "without", **options())
    assert losses(tmp_path / "run") == losses(tmp_path / "without")


def test_the_batch_of_a_step():
    assert [batch_of(step, ()) for step in (1, 2, 3)] == [0, 1, 2]
    assert [batch_of(step, {1, 2, 5}) for step in (1, 2, 3, 4, 5)] == [0, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_spike": 0.5}, "norm_spike is 0.5"),
        ({"loss_spike": np.inf}, "loss_spike is inf"),
        ({"window": 0}, "window is 0"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_rules_that_cannot_work_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Guard(**fields)
