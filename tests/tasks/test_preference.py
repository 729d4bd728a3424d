"""Preferences: losses and gradients against trl 1.16, references, rows of zeros, what cannot be.

The numbers of trl are stored (`preference_reference`); where trl is installed, all are made anew.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lmjax.adapt.adapted import adapted
from lmjax.adapt.lora import Lora
from lmjax.config import build, call, load_config, override
from lmjax.convert.imports import import_folder
from lmjax.core import DecoderOutput, Unembedding
from lmjax.data.preferences import Preferences
from lmjax.engine.loop import train
from lmjax.engine.run import Run, compile_run
from lmjax.engine.warm_start import WarmStart, start
from lmjax.errors import UserError
from lmjax.models.llama import llama
from lmjax.sharding import Layout
from lmjax.tasks.preference import Dpo, Kto, Orpo, Preference
from tests.convert import folders
from tests.tasks import preference_reference as reference

V = reference.VOCABULARY
OBJECTIVES = {
    "dpo": Dpo(beta=reference.BETA),
    "cdpo": Dpo(beta=reference.BETA, label_smoothing=reference.SMOOTHING),
    "ipo": Dpo(beta=reference.BETA, form="ipo"),
    "orpo": Orpo(weight=reference.WEIGHT, likelihood="tokens"),
    "kto": Kto(
        beta=reference.BETA,
        desirable_weight=reference.DESIRABLE,
        undesirable_weight=reference.UNDESIRABLE,
    ),
}
OBJECTIVES["kto_clamped"] = OBJECTIVES["kto"]


class Table(nn.Module):
    """The logits of the next token are a row of a table."""

    max_length: int = 32
    vocab_size: int = V
    stateful: bool = False

    @nn.compact
    def __call__(self, tokens_BT, *, train=False):
        table_VV = self.param("table", nn.initializers.normal(), (V, V))
        return DecoderOutput(table_VV[tokens_BT], Unembedding(jnp.eye(V), V))

    def flop_per_token(self, length):
        return 10.0, 20.0

    def count_params(self, params):
        return {"table": params["table"].size}


def task_of(name, **fields):
    kind = "none" if name == "orpo" else "frozen"
    return Preference(model=Table(), objective=OBJECTIVES[name], reference=kind, **fields)


def params_of(name):
    policy, other = (jnp.asarray(x) for x in reference.tables())
    if name == "orpo":
        return {"table": policy}
    return {"table": policy, "aside": {"reference": {"table": other}}}


def gradient_of(task, params, batch):
    def mean(params):
        output = task.loss({"params": params}, batch, jax.random.key(0), train=True)
        return output.loss.value, output

    (loss, output), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return loss, gradient, output


def check_against(name, expected, **fields):
    batch = reference.batch(name)
    loss, gradient, output = gradient_of(task_of(name, **fields), params_of(name), batch)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient["table"], expected["gradient"], rtol=1e-5, atol=1e-6)
    assert np.abs(expected["gradient"]).max() > 1e-3
    if name.startswith("kto"):
        np.testing.assert_allclose(output.metrics["kl"].value, expected["kl"], rtol=1e-5)
    if name != "orpo":
        assert not np.any(gradient["aside"]["reference"]["table"])


@pytest.mark.parametrize("name", reference.CASES)
def test_equals_trl(name):
    with np.load(reference.PATH) as held:
        expected = {key: held[f"{name}/{key}"] for key in ("loss", "gradient", "kl")}
    check_against(name, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.CASES)
def test_equals_trl_made_anew(name):
    pytest.importorskip("trl")
    expected = reference.case(name)
    check_against(name, expected)
    check_against(name, expected, vocab_chunk=3)


def test_the_stored_cases_have_a_reference_point_and_none():
    with np.load(reference.PATH) as held:
        assert held["kto/kl"] > 0
        assert held["kto_clamped/kl"] == 0


def test_orpo_of_completions_by_hand():
    """The paper's mean: of each chosen text over its own tokens, then over pairs."""
    task = dataclasses.replace(task_of("orpo"), objective=Orpo(weight=reference.WEIGHT))
    batch = reference.batch("orpo")
    loss, _, output = gradient_of(task, params_of("orpo"), batch)
    table = reference.tables()[0].astype("f8")
    logs = table - np.log(np.exp(table).sum(-1, keepdims=True))

    def mean(side):
        each = logs[batch[f"{side}_tokens"], batch[f"{side}_targets"]] * batch[f"{side}_weights"]
        return each.sum(1) / batch[f"{side}_weights"].sum(1)

    chosen, rejected = mean("chosen"), mean("rejected")
    odds = [np.exp(x) / (1 - np.exp(x)) for x in (chosen, rejected)]
    penalty = -np.log(1 / (1 + odds[1] / odds[0]))
    np.testing.assert_allclose(loss, np.mean(-chosen + reference.WEIGHT * penalty), rtol=1e-5)
    np.testing.assert_allclose(output.metrics["nll"].value, np.mean(-chosen), rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_rows_of_zeros_count_nothing(name):
    batch = reference.batch(name)
    longer = {k: np.concatenate([x, np.zeros_like(x[:3])]) for k, x in batch.items()}
    loss, gradient, output = gradient_of(task_of(name), params_of(name), batch)
    found = gradient_of(task_of(name), params_of(name), longer)
    np.testing.assert_allclose(found[0], loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[1], gradient)
    for key, mean in output.metrics.items():
        np.testing.assert_allclose(found[2].metrics[key].value, mean.value, rtol=1e-5, err_msg=key)


def test_metrics_by_hand():
    batch = reference.batch("dpo")
    metrics = gradient_of(task_of("dpo"), params_of("dpo"), batch)[2].metrics
    tables = [t - np.log(np.exp(t).sum(-1, keepdims=True)) for t in reference.tables()]
    sums = {
        (i, side): (
            tables[i][batch[f"{side}_tokens"], batch[f"{side}_targets"]] * batch[f"{side}_weights"]
        ).sum(1)
        for i in range(2)
        for side in ("chosen", "rejected")
    }
    chosen, rejected = (
        reference.BETA * (sums[0, side] - sums[1, side]) for side in ("chosen", "rejected")
    )
    for name, value in (
        ("chosen_log_prob", sums[0, "chosen"].mean()),
        ("rejected_log_prob", sums[0, "rejected"].mean()),
        ("reward_margin", (chosen - rejected).mean()),
        ("reward_accuracy", (chosen > rejected).mean()),
    ):
        np.testing.assert_allclose(metrics[name].value, value, rtol=1e-5, err_msg=name)


def test_refuses_what_cannot_be():
    table = Table()
    for match, fields in (
        ("no adapters", {"model": table, "objective": Dpo()}),
        ("reference 'none'", {"model": table, "objective": Orpo(), "reference": "frozen"}),
        ("'adapters_off' or 'frozen'", {"model": table, "objective": Kto(), "reference": "none"}),
        ("Did you mean", {"model": table, "objective": Dpo(), "reference": "frozn"}),
        ("stateful", {"model": Table(stateful=True), "objective": Orpo(), "reference": "none"}),
    ):
        with pytest.raises(UserError, match=match):
            Preference(**fields)
    with pytest.raises(UserError, match="label_smoothing"):
        Dpo(form="ipo", label_smoothing=0.1)
    with pytest.raises(UserError, match="beta is 0"):
        Kto(beta=0)
    data = Preferences(length=32)
    with pytest.raises(UserError, match="kind='labelled'"):
        dataclasses.replace(task_of("kto"), model=Table(vocab_size=257)).check(data)
    with pytest.raises(UserError, match="vocab_size to at least 257"):
        task_of("dpo").check(data)
    with pytest.raises(UserError, match="length is 64"):
        task_of("dpo").check(Preferences(length=64))


def test_work_and_parameters_count_the_reference():
    spec = {
        k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in reference.batch("dpo").items()
    }
    work = task_of("dpo").work(spec)
    length = reference.LENGTH
    assert (work.units, work.flop, work.flop_full) == (2 * length, 80 * length, 160 * length)
    orpo = task_of("orpo").work(spec)
    assert orpo.flop == 60 * length
    labelled = {
        k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in reference.batch("kto").items()
    }
    kto = task_of("kto").work(labelled)
    assert (kto.units, kto.flop) == (length, 60 * length)
    assert task_of("dpo").count_params(params_of("dpo")) == {"table": V * V, "reference": V * V}


def run_of(kind, **fields):
    """A small run on the made pairs."""
    base = llama(
        num_layers=2,
        dim=32,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=257,
        vocab_multiple=8,
        max_length=64,
        hidden=48,
    )
    objective = {"orpo": Orpo(), "kto": Kto()}.get(kind, Dpo())
    how = {"orpo": "none", "frozen": "frozen"}.get(kind, "adapters_off")
    model = base
    if how == "adapters_off":
        model = adapted(model=base, adapters=(Lora(targets=("query", "mlp/*"), rank=2),))
    return Run(
        task=Preference(model=model, objective=objective, reference=how),
        optimizer=optax.adam(1e-2),
        data=Preferences(length=64, kind="labelled" if kind == "kto" else "pairs"),
        steps=4,
        batch_size=16,
        trainable={"adapters_off": "/lora/", "frozen": "^(?!aside/)", "none": ""}[how],
        save_every=2,
        log_every=1,
        **fields,
    )


def losses(run, devices, num_steps=3):
    program = compile_run(run, devices=devices)
    state, found = program.init(), []
    batches = run.data.batches(batch_size=run.batch_size, seed=0)
    for _, batch in zip(range(num_steps), batches, strict=False):
        state, metrics = program.train_step(state, program.put(batch))
        found.append({name: float(mean.value) for name, mean in metrics.items()})
    return found, state


KINDS = ("adapters", "frozen", "orpo", "kto")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_and_microbatches_equal_one(kind, devices):
    """KTO's reference point is of each microbatch: it is compared on devices alone."""
    run = run_of(kind)
    whole, state = losses(run, devices[:1])
    layout = Layout(data=2, fsdp=2, tensor=2)
    others = [losses(dataclasses.replace(run, layout=layout), devices)[0]]
    if kind != "kto":
        others.append(losses(dataclasses.replace(run, microbatches=4), devices[:1])[0])
    for found in others:
        for a, b in zip(found, whole, strict=True):
            for name in b:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-5, err_msg=name)
    first, last = whole[0], whole[-1]
    if kind in ("adapters", "frozen"):
        np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-6)
    assert last["loss"] < first["loss"]
    if kind == "frozen":
        start = compile_run(run, devices=devices[:1]).init()
        jax.tree.map(np.testing.assert_array_equal, state.frozen, start.frozen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(kind, tmp_path, devices):
    run = run_of(kind)
    options = {"devices": devices[:2], "quiet": True}
    whole = train(run, tmp_path / "whole", **options)
    train(dataclasses.replace(run, steps=2), tmp_path / "torn", **options)
    resumed = train(run, tmp_path / "torn", **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.slow
def test_a_reference_of_its_own_start_equals_adapters_off(tmp_path, devices):
    """Policy and reference from one folder each: the first loss is log 2, gradients are equal."""
    source = folders.write(tmp_path / "in", folders.LLAMA, folders.drawn(folders.LLAMA))
    for name in ("policy", "reference"):
        import_folder(source, tmp_path / name)
    changes = {"task.model.model.dtype": "float32", "task.model.model.remat": "none"}
    policy, reference = (str(tmp_path / name) for name in ("policy", "reference"))
    changes |= {"init_from.path": policy}
    off = load_config("configs/dpo.py:smoke", changes)
    frozen = load_config("configs/dpo.py:smoke", changes)
    override(frozen, "task.reference", "frozen")
    override(frozen, "trainable", "^(?!aside/).*/lora/")
    own, aside = r"^(?!aside/|.*/lora/)", r"^aside/reference/(?!.*/lora/)"
    rename = (("^aside/reference/", ""),)
    starts = (
        call(WarmStart, path=policy, load=own),
        call(WarmStart, path=reference, load=aside, rename=rename),
    )
    override(frozen, "init_from", starts)
    paths = dict.fromkeys(
        ("data.vocabulary.path", "task.model.workdir", "init_from.1.path"), reference
    )
    small = {"data.length": 64, "batch_size": 16, "task.model.dtype": "float32"}
    whole = load_config("configs/dpo.py:frozen", {**paths, **small, "init_from.0.path": policy})
    found = []
    for config in (off, frozen, whole):
        run = build(config)
        program = compile_run(run, devices=devices[:1])
        state, rows = start(run.init_from, run, program), []
        batches = run.data.batches(batch_size=run.batch_size, seed=0)
        for _, batch in zip(range(2), batches, strict=False):
            state, metrics = program.train_step(state, program.put(batch))
            rows.append([float(metrics[name].value) for name in ("loss", "grad_norm")])
        found.append((rows, state.params))
    for rows, _ in found:
        np.testing.assert_allclose(rows[0][0], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    assert found[0][0][0][1] > 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found[1][1],
        found[0][1],
    )
    assert "aside" in state.frozen and "embed" in state.params
