"""Quantised workdirs: what they hold, what they are said to lose, and the way back."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import lmjax
from lmjax.adapt.adapted import Adapted, adapted
from lmjax.adapt.lora import Lora
from lmjax.adapt.quantized import Quantized, quantized
from lmjax.config import build, build_and_resolve, call, from_dict, load_config, to_dict
from lmjax.convert.adapters import export_adapter, merge
from lmjax.convert.exports import export_folder
from lmjax.convert.imports import import_folder
from lmjax.convert.pruned import prune
from lmjax.convert.quantized import dequantize, quantize
from lmjax.convert.workdirs import read_all, whole, with_model, write_arrays
from lmjax.engine.loop import train
from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.models.saved import recorded_model, saved
from lmjax.ops.losses import logits
from lmjax.sharding import unbox
from tests.convert import folders
from tests.test_configs import Failing

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 9))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    source = folders.write(folder / "in", folders.LLAMA, folders.drawn(folders.LLAMA))
    import_folder(source, folder / "run")
    (folder / "text.txt").write_text("".join(f"line {i * i} of so many. " for i in range(300)))
    return folder


def scores(workdir, tokens=TOKENS):
    loaded = lmjax.load(str(workdir))
    output = loaded.model.apply(loaded.variables, tokens)
    return np.asarray(logits(output.hidden_BTD, output.unembedding), np.float64)


def another(source, to, model, change=lambda flat: flat):
    """A workdir with another recorded model."""
    stored, held, lie = whole(source, None)
    write_arrays(source, to, held, with_model(held, to_dict(model)), change(read_all(stored, lie)))


@pytest.mark.slow
def test_what_is_told_is_what_is_there(base, tmp_path):
    text = base / "text.txt"
    told = quantize(
        base / "run", tmp_path / "few", block=16, text=str(text), length=32, num_windows=9
    )
    model = build(recorded_model(tmp_path / "few"))
    assert isinstance(model, Quantized) and (model.kind, model.block) == ("int4", 16)
    ids = np.asarray(lmjax.load(str(base / "run")).tokenizer.encode(text.read_text()))
    rows = ids[len(ids) - len(ids) // 10 :]
    rows = rows[: len(rows) // 33 * 33].reshape(-1, 33)[:9]
    for workdir, measured in ((base / "run", told.before), (tmp_path / "few", told.after)):
        given, wanted = scores(workdir, rows[:, :-1]), rows[:, 1:]
        given -= given.max(-1, keepdims=True)
        likely = given - np.log(np.exp(given).sum(-1, keepdims=True))
        loss = -np.mean(np.take_along_axis(likely, wanted[..., None], -1))
        np.testing.assert_allclose(measured.loss, loss, rtol=1e-5)
        assert measured.accuracy == pytest.approx(np.mean(given.argmax(-1) == wanted))
    assert told.before.loss != told.after.loss
    old, new = (read_all(*whole(w, None)[::2]) for w in (base / "run", tmp_path / "few"))
    assert told.bytes_before == sum(x.nbytes for x in old.values())
    assert told.bytes_after == sum(x.nbytes for x in new.values())
    few = [x for path, x in new.items() if path not in old]
    weights = sum(x.size for path, x in old.items() if path not in new)
    assert told.bits == pytest.approx(8 * sum(x.nbytes for x in few) / weights)
    assert isinstance(lmjax.load(str(tmp_path / "few")).generate("so", max_tokens=3), str)


@pytest.mark.slow
def test_and_back(base, tmp_path):
    quantize(base / "run", tmp_path / "few", kind="nf4", targets=("qkv", "mlp/*"))
    dequantize(tmp_path / "few", tmp_path / "plain")
    np.testing.assert_allclose(scores(tmp_path / "plain"), scores(tmp_path / "few"), atol=1e-6)
    plain, run = (
        {k: x.shape for k, x in read_all(*whole(w, None)[::2]).items()}
        for w in (
            tmp_path / "plain",
            base / "run",
        )
    )
    assert plain == run
    assert to_dict(recorded_model(tmp_path / "plain")) == to_dict(recorded_model(base / "run"))
    export_folder(tmp_path / "plain", tmp_path / "out")
    inner = saved(workdir=str(tmp_path / "few"), dtype="bfloat16", remat="full").model
    assert (inner.dtype, inner.remat) == ("bfloat16", "full")


@pytest.mark.slow
def test_training_aware_loses_nothing(base, tmp_path):
    model = recorded_model(base / "run")
    aware = call(quantized, model=model, kind="int4", block=8, aware=True)
    another(base / "run", tmp_path / "aware", aware)
    quantize(tmp_path / "aware", tmp_path / "few")
    found = build(recorded_model(tmp_path / "few"))
    assert (found.kind, found.block, found.aware) == ("int4", 8, False)
    np.testing.assert_allclose(scores(tmp_path / "few"), scores(tmp_path / "aware"), atol=1e-6)
    assert np.abs(scores(tmp_path / "few") - scores(base / "run")).max() > 1e-3
    with pytest.raises(UserError, match="was trained for kind='int4', not 'int8'"):
        quantize(tmp_path / "aware", tmp_path / "none", kind="int8")


@pytest.mark.slow
def test_qlora_merges_and_is_refused_where_it_does_not_belong(base, tmp_path):
    quantize(base / "run", tmp_path / "few", kind="int8")
    recorded = call(
        adapted,
        model=recorded_model(tmp_path / "few"),
        adapters=(call(Lora, targets=("query", "down"), rank=2),),
    )
    model = build(recorded)
    assert isinstance(model, Adapted)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)["params"])
    rng = np.random.default_rng(1)

    def tuned(flat):
        for path, x in paths_of(unbox(shapes)).items():
            if "/lora/" in path:
                flat[path] = (0.1 * rng.normal(size=x.shape)).astype(np.float32)
        return flat

    another(tmp_path / "few", tmp_path / "lora", recorded, tuned)
    merge(tmp_path / "lora", tmp_path / "merged")
    np.testing.assert_allclose(scores(tmp_path / "merged"), scores(tmp_path / "lora"), atol=1e-5)
    assert not isinstance(build(recorded_model(tmp_path / "merged")), Quantized)
    none = tmp_path / "none"
    for command, message in (
        (lambda: quantize(tmp_path / "lora", none), "has adapters: merge"),
        (lambda: quantize(tmp_path / "few", none), "quantised already, as int8"),
        (lambda: quantize(base / "run", none, kind="int5"), "kind is 'int5'"),
        (lambda: quantize(base / "run", none, block=1), "block is 1"),
        (lambda: quantize(base / "run", none, targets=("upp",)), "names 'upp'.*'up'"),
        (lambda: quantize(base / "run", base / "run"), "holds a run already"),
        (lambda: dequantize(base / "run", none), "is not quantised"),
        (lambda: dequantize(tmp_path / "lora", none), "merge makes it plain"),
        (lambda: export_adapter(tmp_path / "lora", none), "the base is quantised: merge"),
        (lambda: prune(tmp_path / "few", none, method="magnitude"), "dequantise it"),
        (lambda: export_folder(tmp_path / "few", none), "is quantised: make it plain"),
    ):
        with pytest.raises(UserError, match=message):
            command()
        assert not none.exists()


@pytest.mark.slow
def test_a_classifier_keeps_what_it_was_trained_with(base, tmp_path):
    """Its data, which tells the shapes of an example; the model in its evaluations is the new."""
    changes = {"steps": 2, "optimizer.learning_rate.warmup_steps": 1}
    run, tree = build_and_resolve(load_config(str(CONFIGS / "service.py:smoke"), changes))
    source = tmp_path / "run"
    train(dataclasses.replace(run, evals={}), source, config=tree, quiet=True)
    quantize(source, tmp_path / "few", kind="int8", block=4)
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    model = build(from_dict(config["task"]["model"]))
    assert isinstance(model, Quantized) and config["data"] and config["trainable"]
    build(from_dict(config))
    dequantize(tmp_path / "few", tmp_path / "plain")
    old, new = (read_all(*whole(w, None)[::2]) for w in (source, tmp_path / "plain"))
    assert old.keys() == new.keys()
    for path, x in old.items():
        np.testing.assert_allclose(new[path], x, atol=np.abs(x).max() / 200)
    assert any(not np.array_equal(new[path], x) for path, x in old.items())


@pytest.mark.slow
def test_a_config_goes_on_from_it_by_qlora(base, tmp_path):
    """As it does from plain weights: its base stays, a resumed run is the whole one, it merges."""
    quantize(base / "run", tmp_path / "few", kind="nf4", block=16)
    changes = {"init_from.path": str(tmp_path / "few"), "task.model.model.dtype": "float32"}
    run, tree = build_and_resolve(load_config(str(CONFIGS / "lora.py:smoke"), changes))
    run = dataclasses.replace(run, steps=4, save_every=2, evals={})
    options = {"config": tree, "devices": jax.devices()[:2], "quiet": True}
    state = train(run, tmp_path / "lora", **options)
    failing = dataclasses.replace(run, data=Failing(run.data, last=3))
    with pytest.raises(OSError, match="the disk is gone"):
        train(failing, tmp_path / "torn", **options)
    resumed = train(run, tmp_path / "torn", **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    start, end = (read_all(*whole(tmp_path / w, None)[::2]) for w in ("few", "lora"))
    kept = [path for path in start if "kernel_" in path]
    assert len(kept) == 2 * 5
    for path in kept:
        np.testing.assert_array_equal(end[path], start[path])
    merge(tmp_path / "lora", tmp_path / "merged")
    np.testing.assert_allclose(scores(tmp_path / "merged"), scores(tmp_path / "lora"), atol=1e-5)
    old = scores(tmp_path / "few")  # whose vocabulary has no padding
    assert np.abs(scores(tmp_path / "merged")[..., : old.shape[-1]] - old).max() > 1e-3
