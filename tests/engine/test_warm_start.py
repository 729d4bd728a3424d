"""A run that starts with another's parameters: which are loaded, from where, and what is said."""

import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import sharding
from lmjax.config import build, call, from_dict, override, to_dict
from lmjax.core import Mean, Output
from lmjax.engine import warm_start
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.precision import Precision
from lmjax.engine.run import Run, compile_run, draft_run
from lmjax.engine.state import paths_of
from lmjax.engine.streamed import write_checkpoint
from lmjax.engine.warm_start import WarmStart
from lmjax.errors import UserError
from lmjax.ops.rounding import join_halves
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import constant
from lmjax.sharding import Boxed, Layout
from tests.engine.linear_task import Linear, Points
from tests.engine.linear_task import make_run as linear_run

WIDTH, HIDDEN = 8, 16


class Net(Linear):
    """Four parameters in two branches, one of them a vector."""

    def init(self, rng, batch):
        a, b, c = jax.random.split(rng, 3)
        return {
            "params": {
                "body": {
                    "up": Boxed(jax.random.normal(a, (WIDTH, HIDDEN)), ("embed", "mlp")),
                    "down": Boxed(jax.random.normal(b, (HIDDEN, WIDTH)), ("mlp", "embed")),
                },
                "head": {
                    "out": Boxed(jax.random.normal(c, (WIDTH,)), ("embed",)),
                    "bias": Boxed(jnp.zeros(()), ()),
                },
            },
        }

    def loss(self, variables, batch, rng, *, train):
        params = variables["params"]
        total = sum(jnp.sum(x) for x in jax.tree.leaves(params)) * jnp.sum(batch["y"])
        return Output(loss=Mean(total, jnp.float32(1)), metrics={})


class Flat(Net):
    """The same numbers under other names; `out` is a matrix of one column."""

    def init(self, rng, batch):
        params = Net.init(self, rng, batch)["params"]
        out = params["head"]["out"].value.reshape(WIDTH, 1)
        trunk = {"fc_in": params["body"]["up"], "fc_out": params["body"]["down"]}
        return {"params": {"trunk": trunk, "head": {"out": Boxed(out, ("embed", None))}}}


def run_of(task, seed=1, **changes):
    return linear_run(task=task, seed=seed, **changes)


def initialised(run):
    """The parameters that the run starts with by itself."""
    rng = jax.random.split(jax.random.key(run.seed))[0]
    return jax.jit(lambda: sharding.unbox(run.task.init(rng, {})["params"]))()


def start(fields, run, devices):
    return warm_start.start(WarmStart(**fields), run, draft_run(run, devices=devices))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of `Net` on 2 x 2 devices, of step 7, whose averages are not its parameters."""
    folder = tmp_path_factory.mktemp("source")
    optimizer = adamw(learning_rate=constant(peak=0.1), weight_decay=0.0, average=0.5)
    run = run_of(Net(), seed=0, optimizer=optimizer, layout=Layout(data=2, fsdp=2))
    draft, random = draft_run(run, devices=jax.devices()[:4]), np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put(random.normal(size=x.shape).astype(x.dtype), x.sharding),
        draft.abstract_state,
    )
    average = optax.tree_utils.tree_get(state.opt_state, "averaged_params")
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(7, state, {"config": {}, "tokenizer": "none"})
    checkpoints.close()
    return folder, jax.device_get(average)


def test_all_parameters_go_straight_to_their_shards(source, devices, caplog):
    """The average, on another mesh; the rest of the state is that of a fresh start."""
    folder, average = source
    run = run_of(Net(), layout=Layout(data=1, fsdp=4, tensor=2))
    with caplog.at_level(logging.INFO):
        state = warm_start.start(str(folder), run, draft_run(run, devices=devices))
    jax.tree.map(np.testing.assert_array_equal, state.params, average)
    assert int(state.step) == 0 and not any(jnp.any(x) for x in jax.tree.leaves(state.opt_state))
    abstract = draft_run(run, devices=devices).abstract_state
    expected = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == expected
    assert "step 7:\n  4 parameters are loaded" in caplog.text
    assert "tokenizer" not in caplog.text


def test_a_regex_chooses_and_the_others_are_initialised(source, devices, caplog):
    folder, average = source
    run = run_of(Net(), trainable="head", data=Points(tokenizer_text="other"))
    fields = {"path": str(folder / "checkpoints"), "step": 7, "load": "^body/"}
    with caplog.at_level(logging.INFO):
        state = start(fields, run, devices[:1])
    jax.tree.map(np.testing.assert_array_equal, state.frozen, {"body": average["body"]})
    head = {"head": initialised(run)["head"]}
    jax.tree.map(np.testing.assert_array_equal, state.params, head)
    assert "2 parameters are loaded\n  2 left as initialised: head/bias, head/out" in caplog.text
    assert "2 in the checkpoint and not used: head/bias, head/out" in caplog.text
    assert "the same numbers mean another" in caplog.text


def test_other_names_and_another_shape_of_the_same_size(source, devices, caplog):
    folder, average = source
    run = run_of(Flat(), layout=Layout(data=2))
    rename = [("^trunk/fc_in$", "body/up"), ("^trunk/fc_(out)", "body/down")]
    fields = {"path": str(folder / "checkpoints" / "7"), "rename": rename}
    with caplog.at_level(logging.INFO):
        state = start(fields, run, devices[:2])
    trunk = state.params["trunk"]
    np.testing.assert_array_equal(trunk["fc_in"], average["body"]["up"])
    np.testing.assert_array_equal(trunk["fc_out"], average["body"]["down"])
    np.testing.assert_array_equal(state.params["head"]["out"][:, 0], average["head"]["out"])
    assert "1 reshaped: head/out [8] as [8, 1]" in caplog.text


def test_the_optimizers_own_parameters_follow(source, devices):
    """Master bits and averages are made of what was loaded, not of what was initialised."""
    folder, average = source
    optimizer = adamw(learning_rate=constant(peak=0.1), weight_decay=0.0, average=0.5)
    run = run_of(Net(), optimizer=optimizer, precision=Precision(params="bfloat16_master"))
    state = start({"path": str(folder)}, run, devices[:1])
    found = optax.tree_utils.tree_get(state.opt_state, "averaged_params")
    jax.tree.map(np.testing.assert_array_equal, found, average)
    up, low = state.params["body"]["up"], state.opt_state.lower_bits["body"]["up"]
    assert up.dtype == jnp.bfloat16
    np.testing.assert_array_equal(join_halves(up, low), average["body"]["up"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"load": "nothing"}, "load='nothing' matches no parameter. There are: body/down, "),
        ({}, r"has no trunk/fc_in, trunk/fc_out; it has .*body/down.*strict=False"),
        ({"rename": [("fc_in", "up")]}, r"trunk/fc_in \(as trunk/up\)"),
        ({"step": 3}, "has no checkpoint of step 3; there are: 7"),
        (
            {"rename": [("^head/out$", "body/up")], "load": "head/out"},
            r"head/out is \[8, 1\], and opt_state/.*/body/up of the checkpoint \[8, 16\]",
        ),
        ({"load": "fc", "strict": False}, "has no trunk"),
    ],
)
def test_what_does_not_fit_is_refused(source, devices, fields, message):
    folder, _ = source
    run = run_of(Net() if "load" in fields and fields["load"] == "nothing" else Flat())
    with pytest.raises(UserError, match=message):
        start({"path": str(folder), **fields}, run, devices[:1])


def test_what_is_missing_is_initialised_where_that_is_allowed(source, devices):
    folder, average = source
    run = run_of(Flat())
    state = start({"path": str(folder), "strict": False}, run, devices[:1])
    np.testing.assert_array_equal(state.params["head"]["out"][:, 0], average["head"]["out"])
    fresh = initialised(run)["trunk"]
    jax.tree.map(np.testing.assert_array_equal, state.params["trunk"], fresh)


def test_several_starts_each_load_their_own(source, devices, tmp_path, caplog):
    """The body from one run and the head, under other names, from another."""
    folder, average = source
    other = run_of(Flat(), seed=3)
    state = jax.jit(lambda: sharding.unbox(other.task.init(jax.random.key(9), {})))()
    shapes = {f"params/{k}": x for k, x in paths_of(state["params"]).items()}
    write_checkpoint(
        tmp_path / "checkpoints",
        2,
        {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in shapes.items()},
        lambda path: [((0,) * shapes[path].ndim, np.asarray(shapes[path]))],
        {"config": {}, "tokenizer": "none"},
    )
    body = WarmStart(path=str(folder), load="^body/")
    head = WarmStart(path=str(tmp_path), load="^head/out$")
    run = run_of(Net(), init_from=(body, head))
    with caplog.at_level(logging.INFO):
        found = warm_start.start(run.init_from, run, draft_run(run, devices=devices[:1]))
    jax.tree.map(np.testing.assert_array_equal, found.params["body"], average["body"])
    out = state["params"]["head"]["out"][:, 0]
    np.testing.assert_array_equal(found.params["head"]["out"], out)
    assert caplog.text.count("left as initialised") == 1
    assert "1 left as initialised: head/bias" in caplog.text
    twice = (
        body,
        WarmStart(path=str(tmp_path), load="(up|out)$", rename=[("body/up", "trunk/fc_in")]),
    )
    with pytest.raises(UserError, match=rf"loads body/up twice, from {folder} and from {tmp_path}"):
        warm_start.start(twice, run, draft_run(run, devices=devices[:1]))


def test_a_flag_reaches_each_of_several_starts():
    starts = tuple(call(WarmStart, path=name, load=f"^{name}/") for name in ("body", "head"))
    config = call(
        Run,
        task=call(Net),
        optimizer=call(adamw, learning_rate=call(constant, peak=1e-3)),
        data=call(Points),
        steps=2,
        batch_size=8,
        init_from=starts,
    )
    override(config, "init_from.1.path", "runs/other")
    run = build(from_dict(to_dict(config)))
    assert [start.path for start in run.init_from] == ["body", "runs/other"]
    override(config, "init_from", "runs/one")
    assert build(config).init_from == "runs/one"
    override(config, "init_from", starts[0])
    override(config, "init_from", starts)
    assert [start.load for start in build(config).init_from] == ["^body/", "^head/"]


def test_a_damaged_checkpoint_is_refused(source, devices, tmp_path):
    folder, _ = source
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "7" / "state" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    run = run_of(Net())
    with pytest.raises(UserError, match=r"the checkpoint .*7 is damaged: .* cannot be opened"):
        start({"path": str(tmp_path / "run")}, run, devices[:1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path ''"),
        ({"path": "x", "step": -1}, "step -1"),
        ({"path": "x", "load": "("}, "init_from.load: '\\(' is no regular expression"),
        ({"path": "x", "rename": [("[", "a")]}, "init_from.rename"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        WarmStart(**fields)


def test_a_real_program(source, devices):
    """`compile_run`'s own, of a task that can be trained."""
    run = linear_run(seed=5)
    program = compile_run(run, devices=devices[:1])
    folder, average = source
    warm = WarmStart(path=str(folder), load="offset", rename=[("offset", "head/bias")])
    state = warm_start.start(warm, run, program)
    assert float(state.params["offset"]) == float(average["head"]["bias"])
    np.testing.assert_array_equal(state.params["kernel"], program.init().params["kernel"])
    batch = next(run.data.batches(batch_size=16, seed=0))
    assert int(program.train_step(state, program.put(batch))[0].step) == 1
