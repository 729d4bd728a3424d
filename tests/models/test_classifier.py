"""Scores on a model of text: its vector by hand, padding that does not matter, warm starts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.convert.weights import LOADERS
from lmjax.data.labelled_text import LabelledText
from lmjax.engine.program import compile_program
from lmjax.engine.run import Run, compile_run
from lmjax.engine.state import paths_of
from lmjax.engine.warm_start import WarmStart, start
from lmjax.errors import UserError
from lmjax.models.bert import bert
from lmjax.models.classifier import classifier
from lmjax.models.gpt import gpt
from lmjax.sharding import Layout, unbox
from lmjax.tasks.classify import Classify
from tests.convert.test_bert import CONFIG, drawn, written
from tests.models.bert_reference import from_torch_names

SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "vocab_size": 258, "max_length": 24}
LENGTHS = np.array([5, 8, 1])


def batch_of(length):
    tokens = np.random.default_rng(0).integers(1, 250, (3, 8))
    tokens = np.pad(tokens, ((0, 0), (0, length - 8))).astype("i4")
    segments = (np.arange(length)[None] < LENGTHS[:, None]).astype("i4")
    return {"tokens": np.where(segments, tokens, 0), "segments": segments}


@pytest.mark.parametrize(
    "pooling",
    [
        "mean",
        pytest.param("pooler", marks=pytest.mark.slow),
        pytest.param("last", marks=pytest.mark.slow),
    ],
)
def test_scores_by_hand_and_without_padding(pooling):
    """numpy on the encoder's own hidden states; longer padding changes nothing."""
    encoder = bert(**SIZE, dropout=0.0)
    if pooling == "last":
        encoder = gpt(**SIZE)
    model = classifier(encoder=encoder, num_outputs=3, pooling=pooling, dropout=0.0)
    batch, longer = batch_of(8), batch_of(12)

    @jax.jit
    def run(rng):
        variables = unbox(model.init(rng, batch))
        inner = {"params": variables["params"]["encoder"]}
        output = encoder.apply(inner, batch["tokens"], segments_BT=batch["segments"])
        values = [model.apply(variables, x).values_BC for x in (batch, longer)]
        scores = variables["params"]["scores"]
        return values, output.hidden_BTD, getattr(output, "pooled_BD", None), scores

    (values, padded), hidden, pooled, scores = run(jax.random.key(0))
    hidden = np.asarray(hidden)
    vector = {
        "pooler": lambda: np.asarray(pooled),
        "mean": lambda: np.stack([h[:n].mean(0) for h, n in zip(hidden, LENGTHS, strict=True)]),
        "last": lambda: np.stack([h[n - 1] for h, n in zip(hidden, LENGTHS, strict=True)]),
    }[pooling]()
    expected = vector @ np.asarray(scores["kernel"]) + np.asarray(scores["bias"])
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(padded, values, rtol=1e-5, atol=1e-6)


def test_counts_and_flop():
    encoder = bert(**SIZE, vocab_multiple=128)
    model = classifier(encoder=encoder, num_outputs=3)
    batch = batch_of(8)
    params = unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), batch)))["params"]
    counts = model.count_params(params)
    assert counts["embed"] == 258 * 16 and counts["scores"] == 16 * 3 + 3
    example = {"tokens": jax.ShapeDtypeStruct((8,), np.int32)}
    per_token = 24 * 16**2 + 4 * 8 * 16
    assert model.flop(example) == pytest.approx(8 * per_token + 2 * 16**2 + 2 * 16 * 3)
    of_decoder = classifier(encoder=gpt(**SIZE), num_outputs=3, pooling="last").flop(example)
    assert of_decoder == pytest.approx(8 * (24 * 16**2 + 2 * 16 * (8 + 1)) + 2 * 16 * 3)


def test_data_and_settings_that_do_not_fit_are_refused():
    model = classifier(encoder=bert(**SIZE, pooler=False), num_outputs=2, pooling="pooler")

    def shapes(length, vocab_size):
        example = {"tokens": jax.ShapeDtypeStruct((length,), np.int32)}
        return types.SimpleNamespace(example=example, vocab_size=vocab_size)

    model.check(shapes(24, 258))
    with pytest.raises(UserError, match=r"data\.length is 25"):
        model.check(shapes(25, 258))
    with pytest.raises(UserError, match="set it to at least 259"):
        model.check(shapes(24, 259))
    with pytest.raises(UserError, match="the model reads text, and SimpleNamespace has none"):
        model.check(types.SimpleNamespace(example={"features": None}))
    with pytest.raises(UserError, match="the model has no pooler"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), batch_of(8)))
    with pytest.raises(UserError, match="Did you mean 'mean'"):
        classifier(encoder=None, num_outputs=2, pooling="means")
    with pytest.raises(UserError, match="num_outputs is 0"):
        classifier(encoder=None, num_outputs=0)
    with pytest.raises(UserError, match="at least 0 and below 1"):
        classifier(encoder=None, num_outputs=2, dropout=1.0)


@pytest.mark.slow
def test_the_encoder_starts_from_an_imported_folder(tmp_path):
    """Its branch is the stored arrays, by an independent reading of them; the scores are drawn."""
    stored = from_torch_names(drawn("BertModel"), num_heads=CONFIG["num_attention_heads"])
    folder = written(tmp_path / "in", "BertModel", drawn("BertModel"))
    encoder = bert(
        num_layers=CONFIG["num_hidden_layers"],
        dim=CONFIG["hidden_size"],
        hidden=CONFIG["intermediate_size"],
        num_heads=CONFIG["num_attention_heads"],
        vocab_size=CONFIG["vocab_size"],
        max_length=CONFIG["max_position_embeddings"],
        activation="tanh",
        epsilon=CONFIG["layer_norm_eps"],
    )
    warm = WarmStart(path=f"hf:{folder}", rename=(("^encoder/", ""),), strict=False)
    run = Run(
        task=Classify(model=classifier(encoder=encoder, num_outputs=2)),
        optimizer=optax.adam(1e-3),
        data=LabelledText(path="made", length=16),
        steps=1,
        batch_size=8,
        init_from=warm,
    )
    program = compile_run(run, devices=jax.devices()[:1])
    found = paths_of(start(warm, run, program, LOADERS).params)
    fresh = paths_of(program.init().params)
    assert {path for path in found if not path.startswith("encoder/")} == {
        "scores/kernel",
        "scores/bias",
    }
    for path, x in found.items():
        wanted = stored.get(path.removeprefix("encoder/"))
        np.testing.assert_array_equal(x, fresh[path] if wanted is None else wanted, err_msg=path)
        assert (wanted is None) == path.startswith("scores/")


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["pooler", "mean", "last"])
@pytest.mark.parametrize(
    "layout",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"context": 4, "fsdp": 2},
        {"fsdp": 4, "tensor": 2},
    ],
    ids=str,
)
def test_one_device_equals_eight(devices, layout, pooling):
    size = {**SIZE, "vocab_multiple": 64, "dropout": 0.0}
    encoder = gpt(**size) if pooling == "last" else bert(**size)
    task = Classify(
        model=classifier(encoder=encoder, num_outputs=2, pooling=pooling, dropout=0.0),
        classes=("negative", "positive"),
        class_weights={"positive": 2.0},
    )
    data = LabelledText(path="made", length=16)
    losses = []
    for shape, chosen in (({}, devices[:1]), (layout, devices)):
        program = compile_program(
            task,
            optax.adam(1e-2),
            Layout(**shape),
            data.example,
            batch_size=16,
            devices=chosen,
        )
        state, found = program.init(), []
        batches = data.batches(batch_size=16, seed=0)
        for _ in range(3):
            state, metrics = program.train_step(state, program.put(next(batches)))
            found.append([float(metrics[name].value) for name in ("loss", "accuracy")])
        losses.append(found)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
def test_nothing_real_is_no_number_that_spoils_others():
    """A row of zeros that only completes a batch: finite scores."""
    model = classifier(encoder=bert(**SIZE, dropout=0.0, pooler=False), num_outputs=2)
    batch = {"tokens": np.zeros((1, 8), "i4"), "segments": np.zeros((1, 8), "i4")}
    found = jax.jit(lambda: model.init_with_output(jax.random.key(0), batch)[0].values_BC)()
    assert jnp.isfinite(found).all()
