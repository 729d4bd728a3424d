"""Hidden states of inner layers: those of models that are cut there, and what a student learns."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from lmjax.adapt.adapted import adapted
from lmjax.adapt.lora import Lora
from lmjax.config import build_and_resolve, load_config
from lmjax.engine.loop import train
from lmjax.engine.run import compile_run
from lmjax.errors import UserError
from lmjax.layers.hidden import num_layers_of
from lmjax.models.decoder import Stacks
from lmjax.models.gpt import gpt
from lmjax.models.llama import llama
from lmjax.models.lstm import lstm
from lmjax.sharding import Layout, unbox
from lmjax.tasks.distill import Distill
from lmjax.tasks.forward import forward

SIZES = {"num_heads": 2, "vocab_size": 30, "max_length": 12}
STUDENT = gpt(num_layers=2, dim=16, **SIZES)
TEACHER = llama(num_layers=4, dim=24, hidden=32, **SIZES)
PAIRS = ((0, 1), (1, 3))


class Plain(nn.Module):
    """In the place of a norm."""

    def __call__(self, x):
        return x


def cut(model, params, num_layers):
    """The residual stream of a model that has but its first layers, and no norm behind them."""
    shorter = model.clone(blocks=model.blocks.clone(num_layers=num_layers), norm=Plain())
    kept = {**params, "blocks": jax.tree.map(lambda x: x[:num_layers], params["blocks"])}
    return lambda tokens: shorter.apply({"params": kept}, tokens).hidden_BTD


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(0, 30, (2, 12)).astype("i4"),
        "targets": random.integers(0, 30, (2, 12)).astype("i4"),
        "weights": random.integers(0, 2, (2, 12)).astype("f4"),
    }


def task_of(student=STUDENT, teacher=TEACHER, **fields):
    fields = {"hidden": 0.3, "hidden_layers": PAIRS, **fields}
    return Distill(model=student, teacher=teacher, **fields)


@pytest.fixture(scope="module")
def variables(batch):
    """Drawn, as to initialise takes longer."""
    shapes = jax.eval_shape(lambda: unbox(task_of().init(jax.random.key(0), batch)))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: random.normal(0.0, 0.3, x.shape).astype("f4"), shapes)


def gradient_of(task, variables, batch, metric):
    """Of one of the metrics, in the parameters; and all that the loss gives."""

    def value(params):
        output = task.loss({"params": params}, batch, jax.random.key(0), train=True)
        return output.metrics[metric].value, output

    (_, output), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(variables["params"])
    return gradient, output


@pytest.mark.parametrize("pairs", [PAIRS[:1], pytest.param(PAIRS[1:], marks=pytest.mark.slow)])
def test_equals_models_that_are_cut(variables, batch, pairs):
    """The differences by hand, and the loss that is made of them."""
    task = task_of(alpha=0.5, temperature=2.0)
    output = jax.jit(lambda v: task.loss(v, batch, jax.random.key(0), train=True))(variables)
    params = dict(variables["params"])
    aside = params.pop("aside")
    metrics = {name: np.asarray(mean.value) for name, mean in output.metrics.items()}
    weights = batch["weights"]

    @jax.jit
    def states(tokens):
        teacher = aside["teacher"]
        return [
            (cut(STUDENT, params, s + 1)(tokens), cut(TEACHER, teacher, t + 1)(tokens))
            for s, t in pairs
        ]

    total = 0.5 * metrics["loss"] + 0.5 * 4 * metrics["teacher_kl"] + 0.3 * metrics["hidden_mse"]
    total += 0.3 * sum(metrics[f"hidden_mse_{s}_{t}"] for s, t in PAIRS)
    for (s, t), (own, taught) in zip(pairs, states(batch["tokens"]), strict=True):
        projection = aside[f"projection_{s}_{t}"]["kernel"]
        apart = np.mean((np.asarray(own) @ projection - np.asarray(taught)) ** 2, axis=-1)
        found = metrics[f"hidden_mse_{s}_{t}"]
        np.testing.assert_allclose(found, np.sum(apart * weights) / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(output.loss.value, total, rtol=1e-5)
    assert task.count_params(variables["params"])["projection"] == 3 * 16 * 24


@pytest.mark.slow
def test_early_layers_alone_learn_of_early_pairs(variables, batch):
    """And no teacher does."""
    gradient, _ = gradient_of(task_of(), variables, batch, "hidden_mse_0_1")
    aside = gradient["aside"]
    assert not any(np.any(x) for x in jax.tree.leaves(aside["teacher"]))
    assert np.any(aside["projection_0_1"]["kernel"])
    assert not np.any(aside["projection_1_3"]["kernel"])
    for kernel in jax.tree.leaves(gradient["blocks"]):
        assert np.any(kernel[0]) and not np.any(kernel[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "unroll"), [("full", 1), ("dots", 2), ("none", 4), ("offload", 1)]
)
def test_remat_and_unroll_change_nothing(variables, batch, remat, unroll):
    wanted = gradient_of(task_of(), variables, batch, "hidden_mse_1_3")
    fields = {"remat": remat, "unroll": unroll}
    other = task_of(
        gpt(num_layers=2, dim=16, **SIZES, **fields),
        llama(num_layers=4, dim=24, hidden=32, **SIZES, **fields),
    )
    found = gradient_of(other, variables, batch, "hidden_mse_1_3")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.slow
def test_layers_count_through_stacks_of_unlike_blocks_and_adapters(batch):
    """What comes back is in the order asked for."""
    parts = tuple(llama(num_layers=n, dim=24, hidden=32, **SIZES).blocks for n in (1, 2))
    model = TEACHER.clone(blocks=Stacks(parts))
    tuned = adapted(model=model, adapters=(Lora(targets=("query",), rank=2),))
    tokens = batch["tokens"]
    assert num_layers_of(tuned) == 3
    held = jax.jit(lambda: unbox(tuned.init(jax.random.key(0), tokens)))()
    output, _, (second, first) = jax.jit(
        lambda v: forward(tuned, v, tokens, train=False, layers=(2, 0))
    )(held)
    last = nn.RMSNorm(epsilon=1e-5).apply(
        {"params": {"scale": held["params"]["norm"]["scale"]}}, second
    )
    np.testing.assert_allclose(output.hidden_BTD, last, rtol=1e-5, atol=1e-5)
    shorter = model.clone(blocks=model.stacks[0].clone(num_layers=1), norm=Plain())
    params = {**held["params"], "blocks": held["params"]["blocks"]["parts_0"]}
    wanted = shorter.apply({"params": params}, tokens).hidden_BTD
    np.testing.assert_allclose(first, wanted, rtol=1e-5, atol=1e-5)


class Words:
    """What a task asks of its data."""

    example = {  # noqa: RUF012, nothing changes it
        "tokens": jax.ShapeDtypeStruct((12,), np.int32),
        "targets": jax.ShapeDtypeStruct((12,), np.int32),
        "weights": jax.ShapeDtypeStruct((12,), np.float32),
    }
    vocab_size = 30


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_layers": ((2, 0),)}, "the student has no layer 2: it has 2 layers, 0 to 1"),
        ({"hidden_layers": ((0, 4), (1, -1))}, "the teacher has no layer -1, 4: it has 4 layers"),
        ({"hidden_layers": PAIRS, "hidden": 0.0}, "set hidden to the weight"),
        ({"hidden_layers": ((0, 1), (0, 1))}, "stands twice"),
        (
            {"student": lstm(dim=16, units=16, vocab_size=30, max_length=12, stateful=False)},
            "the student gives no hidden states",
        ),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        task_of(**fields).check(Words())


def run_of(**fields):
    run, tree = build_and_resolve(load_config("configs/char.py:smoke"))
    model = run.task.model
    task = Distill(
        model=model,
        teacher=model.clone(blocks=model.blocks.clone(num_layers=4)),
        hidden=0.5,
        hidden_layers=((0, 1), (1, 3)),
    )
    changes = {"task": task, "trainable": "^(?!aside/teacher/)", "evals": {}, "steps": 4}
    return dataclasses.replace(run, **{**changes, "save_every": 2, **fields}), tree


@pytest.mark.slow
def test_eight_devices_and_microbatches_equal_one(devices):
    found = []
    for layout, count, microbatches in (
        (Layout(), 1, 1),
        (Layout(data=2, fsdp=2, tensor=2), 8, 1),
        (Layout(slices=2, context=2), 8, 1),
        (Layout(), 1, 4),
    ):
        run = run_of(layout=layout, microbatches=microbatches)[0]
        program = compile_run(run, devices=devices[:count])
        state, losses = program.init(), []
        batches = run.data.batches(batch_size=run.batch_size, seed=run.seed)
        for _, batch in zip(range(3), batches, strict=False):
            state, metrics = program.train_step(state, program.put(batch))
            losses.append([float(metrics[n].value) for n in ("loss", "hidden_mse_0_1")])
        found.append(losses)
    for losses in found[1:]:
        np.testing.assert_allclose(losses, found[0], rtol=1e-5)


@pytest.mark.slow
def test_a_pipeline_is_refused(devices):
    with pytest.raises(UserError, match=r"stage=2, and a pipeline gives no hidden states"):
        compile_run(run_of(layout=Layout(stage=2, data=4))[0], devices=devices)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path, devices):
    run, tree = run_of()
    options = {"config": tree, "devices": devices[:2], "quiet": True}
    whole = train(run, tmp_path / "whole", **options)
    train(dataclasses.replace(run, steps=2), tmp_path / "torn", **options)
    resumed = train(run, tmp_path / "torn", **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_nothing_is_kept_unless_asked(variables, batch):
    """The program of a model that no one asks is the one that it was."""
    params = {k: v for k, v in variables["params"].items() if k != "aside"}

    def text(layers):
        def call(params):
            output, _, kept = forward(
                STUDENT, {"params": params}, batch["tokens"], train=False, layers=layers
            )
            return output.hidden_BTD, kept

        return str(jax.make_jaxpr(call)(params))

    plain = str(
        jax.make_jaxpr(lambda p: STUDENT.apply({"params": p}, batch["tokens"]).hidden_BTD)(params)
    )
    assert "dynamic_update" not in text(())
    assert len(text(())) == len(plain)
    assert "dynamic_update" in text((0,))
