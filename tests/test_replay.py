"""A step that runs again: the right state, the right batch, and what is wrong in it by name."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.config import build_and_resolve, call
from lmjax.data.text import Text
from lmjax.data.vocabulary import Bytes
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.curves import read_metrics
from lmjax.engine.guard import Guard
from lmjax.engine.loop import BadStep, train
from lmjax.engine.precision import Precision, keep, widen
from lmjax.engine.run import Run, compile_run
from lmjax.errors import Exit, UserError
from lmjax.models.gpt import gpt
from lmjax.ops.rounding import join_halves
from lmjax.optim.presets import sgd
from lmjax.optim.schedules import constant
from lmjax.replay import _in_float32, replay
from lmjax.tasks.causal_lm import CausalLM
from tests.engine.linear_task import Linear, Points

LAYERS, LENGTH, VOCABULARY = 2, 8, 257


def points(**changes):
    """A run of ten steps of three numbers."""
    fields = {"nan_at": changes.pop("nan_at", -1)}
    return call(
        Run,
        task=call(Linear),
        optimizer=call(sgd, learning_rate=call(constant, peak=0.01)),
        data=call(Points, **fields),
        **{
            "steps": 10,
            "batch_size": 16,
            "save_every": 4,
            "keep_last": 9,
            "log_every": 1,
            **changes,
        },
    )


def text(path, **changes):
    """A run of a small GPT in mixed precision."""
    model = call(
        gpt,
        num_layers=LAYERS,
        dim=8,
        num_heads=2,
        vocab_size=VOCABULARY,
        max_length=LENGTH,
        dtype="bfloat16",
    )
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(sgd, learning_rate=call(constant, peak=1e-2)),
        data=call(Text, path=path, length=LENGTH, vocabulary=call(Bytes), valid_fraction=0.0),
        precision=call(Precision, params="bfloat16_master"),
        **{"steps": 4, "batch_size": 4, "save_every": 2, "log_every": 1, **changes},
    )


def trained(config, workdir):
    """Trains as the launcher does; returns the run."""
    run, tree = build_and_resolve(config)
    train(run, workdir, config=tree, devices=jax.devices()[:1], quiet=True)
    return run


def again(workdir, step=None, **options):
    return replay(workdir, step, devices=jax.devices()[:1], **options)


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sound")
    trained(points(), workdir)
    return workdir


@pytest.mark.parametrize(
    ("step", "start"),
    [
        (2, "step 0 and 1 steps"),
        (5, "checkpoints/4"),
        (8, "checkpoints/4 and 3 steps"),
    ],
)
def test_any_step_runs_again(sound, step, start):
    found = again(sound, step)
    assert (found.step, found.batch, found.start) == (step, step - 1, start)
    assert found.finding is None
    assert found.finite
    np.testing.assert_allclose(found.metrics["loss"], losses(sound)[step], rtol=1e-5)


def test_the_steps_before_run_in_the_layout_of_the_run(sound, devices, caplog):
    found = replay(sound, 8, devices=devices)
    np.testing.assert_allclose(found.metrics["loss"], losses(sound)[8], rtol=1e-5)
    assert "one device" not in caplog.text
    found = replay(sound, 8, devices=devices[:3])  # which do not divide the rows
    np.testing.assert_allclose(found.metrics["loss"], losses(sound)[8], rtol=1e-5)
    assert "the steps before run on one device" in caplog.text


def test_a_run_that_stopped_tells_the_bad_row(tmp_path):
    with pytest.raises(BadStep, match=r"lmjax\.replay"):
        trained(points(nan_at=5), tmp_path)
    found = again(tmp_path)
    assert (found.step, found.batch, found.start) == (6, 5, "incidents/5")
    assert (found.finding.array, found.finding.index) == ("batch/y", (0,))
    assert not found.finite
    assert "not finite first: batch/y, given\n" in str(found)
    os.rename(tmp_path / "incidents", tmp_path / "gone")
    without = again(tmp_path)
    assert without.start == "checkpoints/4 and 1 steps"
    assert without.finding == found.finding


def test_the_rows_that_were_kept_are_used_where_the_data_has_changed(tmp_path, caplog, monkeypatch):
    with pytest.raises(BadStep):
        trained(points(nan_at=5), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"nan_at": 5', '"nan_at": -1'))
    monkeypatch.setattr(Points, "fingerprint", "other points")
    assert again(tmp_path).finding.array == "batch/y"
    assert "are not what the data gives now" in caplog.text
    with pytest.raises(UserError, match=r"the fingerprint of the data .* Has the corpus changed"):
        again(tmp_path, 5)
    kept = tmp_path / "incidents" / "batch-6-0.npz"
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(UserError, match="the fingerprint of the data"):
        again(tmp_path)
    assert "batch-6-0.npz cannot be read" in caplog.text


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_that_went_on_is_followed(tmp_path, policy):
    trained(points(nan_at=5, guard=call(Guard, policy=policy)), tmp_path)
    bad = again(tmp_path, 6)
    assert (bad.step, bad.batch, bad.finding.array) == (6, 5, "batch/y")
    later = again(tmp_path, 8)
    assert (later.batch, later.finding) == (7 + (policy == "rollback"), None)
    np.testing.assert_allclose(later.metrics["loss"], losses(tmp_path)[8], rtol=1e-5)


def test_a_run_of_low_precision_is_rebuilt_in_float32():
    """Parameters come back bit for bit, where the optimizer had the rest of their bits."""
    _, tree = build_and_resolve(text(__file__))
    tree["precision"]["products"] = "int8"
    changed = _in_float32(tree)
    assert changed["task"]["model"]["dtype"] == changed["precision"]["params"] == "float32"
    assert changed["precision"]["products"] == "default"
    assert tree["task"]["model"]["dtype"] == "bfloat16"
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.normal(size=(3, 4)), "f4"), "bias": jnp.ones(4)}
    for kept in ("float32", "bfloat16_master"):
        precision = Precision(params=kept)
        state = keep(precision, optax.sgd(0.1), params, params)
        wide, frozen, _ = widen(precision, *state)
        jax.tree.map(np.testing.assert_array_equal, wide, params)
        assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("float32")}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """(workdir, run, its program, the state after step 2) of a small GPT."""
    workdir = tmp_path_factory.mktemp("language")
    file = workdir / "text.txt"
    file.write_text("".join(chr(97 + i * i % 26) for i in range(2000)))
    run = trained(text(str(file)), workdir / "run")
    program = compile_run(run, devices=jax.devices()[:1])
    checkpoints = Checkpoints(workdir / "run" / "checkpoints")
    _, state, about = checkpoints.restore(program.abstract_state, lambda _: None, at_most=2)
    checkpoints.close()
    return workdir / "run", run, state, about


@pytest.mark.slow
def test_a_step_of_a_bfloat16_run_in_float32(language):
    """The oracle joins the halves of the parameters and calls the loss of a float32 model."""
    workdir, run, state, _ = language
    lower = jax.tree.leaves(state.opt_state.lower_bits, is_leaf=lambda x: x is None)
    upper, structure = jax.tree.flatten(state.params)
    halves = zip(upper, lower, strict=True)
    params = jax.tree.unflatten(
        structure, [u if low is None else join_halves(u, low) for u, low in halves]
    )
    model = gpt(num_layers=LAYERS, dim=8, num_heads=2, vocab_size=VOCABULARY, max_length=LENGTH)
    batch = next(iter(run.data.batches(batch_size=4, seed=0, start=2)))
    task = CausalLM(model=model)

    def loss(params):
        return task.loss({"params": params}, batch, jax.random.key(0), train=True).loss.value

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    found = again(workdir, 3)
    assert (found.start, found.precision, found.finding) == ("checkpoints/2", "float32", None)
    np.testing.assert_allclose(found.metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(found.metrics["grad_norm"], norm, rtol=1e-4)


@pytest.mark.slow
def test_a_step_of_a_bfloat16_run_as_it_was(language):
    workdir, *_ = language
    as_trained = again(workdir, 3, as_trained=True)
    np.testing.assert_allclose(as_trained.metrics["loss"], losses(workdir)[3], rtol=1e-5)
    assert as_trained.metrics["grad_norm"] != again(workdir, 3).metrics["grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "what", "layer"),
    [
        (3e38, "DecoderLM/blocks/block/mlp/up, layer 1, forward pass", 1),
        (np.nan, "params/blocks/block/mlp/up/kernel, layer 1, given", 1),
    ],
)
def test_a_module_is_named(language, tmp_path, value, what, layer):
    workdir, _, state, about = language
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    (tmp_path / "checkpoints").mkdir()
    flat = flatten_dict(dict(state.params), sep="/")
    flat["blocks/block/mlp/up/kernel"] = flat["blocks/block/mlp/up/kernel"].at[layer].set(value)
    broken = state.replace(params=unflatten_dict(flat, sep="/"))
    kept = Checkpoints(tmp_path / "incidents")
    kept.save(
        2, broken, {name: about[name] for name in ("config", "tokenizer", "fingerprint", "data")}
    )
    kept.close()
    found = again(tmp_path, 3)
    assert found.start == "incidents/2"
    assert found.finding.layer == layer
    assert str(found.finding).startswith(what)


def test_what_cannot_run_again_is_said(sound, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        again(tmp_path, 1)
    with pytest.raises(UserError, match="no incidents: name a step"):
        again(sound)
    with pytest.raises(UserError, match="the run has 10 steps"):
        again(sound, 11)
    with pytest.raises(UserError, match="count from 1"):
        again(sound, 0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no task"):
        again(tmp_path, 1)
    (tmp_path / "config.json").write_text((sound / "config.json").read_text())
    with pytest.raises(UserError, match="no checkpoints"):
        again(tmp_path, 1)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lmjax.replay", *arguments], capture_output=True, text=True
    )


def test_the_command_tells_what_is_not_finite(sound, tmp_path):
    tree = json.loads((sound / "config.json").read_text())
    tree["data"]["nan_at"] = 4
    (tmp_path / "config.json").write_text(json.dumps(tree))
    os.symlink(sound / "checkpoints", tmp_path / "checkpoints")
    done = command(f"--workdir={tmp_path}", "--step=5")
    assert done.returncode == Exit.NOT_FINITE, done.stderr
    assert done.stdout.startswith("step 5, batch 4, from checkpoints/4, in float32\n")
    assert "not finite first: batch/y, given\n" in done.stdout


@pytest.mark.slow
def test_the_command_ends_well_or_with_a_sentence(sound, tmp_path):
    done = command(f"--workdir={sound}", "--step=5")
    assert done.returncode == Exit.DONE, done.stderr
    assert "all that the step computes from it is finite" in done.stdout
    for arguments in ([f"--workdir={tmp_path}"], [], ["--workdir=x", "--step=y"], ["--nothing"]):
        done = command(*arguments)
        assert done.returncode == Exit.USAGE, arguments
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
