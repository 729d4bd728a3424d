"""BERT's weights in and out: every combination of heads, and what is refused."""

import json
import logging

import numpy as np
import pytest

from lmjax.convert.exports import export_folder
from lmjax.convert.imports import import_folder
from lmjax.convert.weights import open_folder
from lmjax.errors import UserError
from tests.convert import folders
from tests.convert.test_convert import read_shards, stored_arrays
from tests.models.bert_reference import from_torch_names

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": folders.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-6,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.2,
    "pad_token_id": 3,
}
D, F = CONFIG["hidden_size"], CONFIG["intermediate_size"]
TABLE = "embeddings.word_embeddings.weight"
TRANSFORM = "cls.predictions.transform"
CLASSES = {  # class of transformers: whether (it predicts tokens, it has a pooler)
    "BertModel": (False, True),
    "BertForMaskedLM": (True, False),
    "BertForPreTraining": (True, True),
    "BertForTokenClassification": (False, False),
}


def drawn(architecture, dtype=np.float32):
    """Random weights by the names that the class gives them."""
    predicting, pooler = CLASSES[architecture]
    found = {TABLE: (folders.VOCAB, D)}
    found["embeddings.position_embeddings.weight"] = (CONFIG["max_position_embeddings"], D)
    found["embeddings.token_type_embeddings.weight"] = (CONFIG["type_vocab_size"], D)
    products = {"pooler": (D, D)} if pooler else {}
    norms = ["embeddings"]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            found[f"{layer}.attention.self.{name}.weight"] = (D, D)
            found[f"{layer}.attention.self.{name}.bias"] = (D,)
        products[f"{layer}.attention.output"] = (D, D)
        products[f"{layer}.intermediate"] = (F, D)
        products[f"{layer}.output"] = (D, F)
        norms += [f"{layer}.attention.output", f"{layer}.output"]
    if predicting:
        products[TRANSFORM] = (D, D)
        norms.append(TRANSFORM)
        found["cls.predictions.bias"] = (folders.VOCAB,)
    for name, shape in products.items():
        found |= {f"{name}.dense.weight": shape, f"{name}.dense.bias": shape[:1]}
    for name in norms:
        found |= {f"{name}.LayerNorm.weight": (D,), f"{name}.LayerNorm.bias": (D,)}
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=shape).astype(dtype) for name, shape in found.items()}
    if architecture == "BertModel":
        return weights
    return {k if k.startswith("cls.") else f"bert.{k}": v for k, v in weights.items()}


def written(folder, architecture, weights, **changes):
    config = {**CONFIG, "architectures": [architecture], **changes}
    return folders.write(folder, config, weights)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("BertModel", np.float32),
        ("BertForPreTraining", folders.BF16),
        pytest.param("BertForMaskedLM", np.float32, marks=pytest.mark.slow),
        pytest.param("BertForTokenClassification", np.float32, marks=pytest.mark.slow),
    ],
)
def test_import_is_the_mapping_and_export_is_its_inverse(tmp_path, architecture, dtype):
    weights = drawn(architecture, dtype)
    import_folder(written(tmp_path / "in", architecture, weights), tmp_path / "run")
    found = stored_arrays(tmp_path / "run")
    wanted = from_torch_names(weights, num_heads=4)
    assert found.keys() == wanted.keys()
    for path, array in found.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, wanted[path], err_msg=path)
    export_folder(tmp_path / "run", tmp_path / "out")
    back, config = read_shards(tmp_path / "out"), tmp_path / "out" / "config.json"
    predicting, pooler = CLASSES[architecture]
    if not predicting:
        weights = {name.removeprefix("bert."): x for name, x in weights.items()}
    assert {k: (x.dtype, x.tobytes()) for k, x in back.items()} == {
        k: (x.dtype, x.tobytes()) for k, x in weights.items()
    }
    again = json.loads(config.read_text())
    named = ["BertForMaskedLM" if predicting else "BertModel"]
    assert {k: again[k] for k in CONFIG} == {**CONFIG, "architectures": named}
    assert again.get("add_pooling_layer", not predicting) == pooler
    reread = open_folder(tmp_path / "out")
    assert set(reread.arrays) == set(wanted)


def test_other_heads_are_left_out_and_old_names_are_known(tmp_path, caplog):
    """As in the files that Google's checkpoints became: gamma and beta, and a head beside ours."""
    weights = drawn("BertForPreTraining")
    plain = open_folder(written(tmp_path / "plain", "BertForPreTraining", weights))
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in weights.items()
    }
    old["cls.seq_relationship.weight"] = np.ones((2, D), np.float32)
    old["cls.seq_relationship.bias"] = np.ones(2, np.float32)
    old["cls.predictions.decoder.weight"] = weights[f"bert.{TABLE}"].copy()
    old["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].copy()
    old["bert.embeddings.position_ids"] = np.arange(24)[None]
    with caplog.at_level(logging.WARNING, logger="lmjax"):
        found = open_folder(written(tmp_path / "old", "BertForMaskedLM", old))
    assert "cls.seq_relationship.bias, cls.seq_relationship.weight: left out" in caplog.text
    assert found.settings.get("architectures") == ["BertForMaskedLM"]
    assert found.arrays.keys() == plain.arrays.keys()
    for path in ("head/norm/scale", "head/bias", "embed_norm/bias", "embed/table"):
        for (_, x), (_, y) in zip(found.blocks(path), plain.blocks(path), strict=True):
            np.testing.assert_array_equal(x, y)


def test_tables_of_the_vocabulary_are_padded_as_the_model_has_them(tmp_path):
    source = written(tmp_path / "in", "BertForMaskedLM", drawn("BertForMaskedLM"))
    shapes = {"embed/table": (264, D), "head/bias": (264,)}
    found = open_folder(source, shapes)
    for path, shape in shapes.items():
        array = np.concatenate([block for _, block in found.blocks(path)])
        assert array.shape == shape and not array[folders.VOCAB :].any()


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("BertModel", {"pooler.dense.bias": None}, "lacks 'pooler.dense.bias'"),
        ("BertModel", {"encoder.layer.3.output.dense.bias": np.ones(D, "f4")}, "has 'encoder.lay"),
        ("BertModel", {TABLE: np.ones((9, D), "f4")}, r"has the shape \[9, 32\], and .* \[261, 32"),
        ("BertModel", {TABLE: np.ones((261, D), "i4")}, "is I32"),
        ("BertModel", {f"bert.{TABLE}": np.ones((261, D), "f4")}, f"hold '{TABLE}' twice"),
        ("BertModel", {"lm_head.weight": np.ones((261, D), "f4")}, "its lm_head.weight is another"),
        ("BertForMaskedLM", {"cls.predictions.bias": None}, "lacks 'cls.predictions.bias'"),
        (
            "BertForMaskedLM",
            {"cls.predictions.decoder.weight": np.ones((261, D), "f4")},
            "cls.predictions.decoder.weight is not embeddings.word_embeddings.weight",
        ),
    ],
)
def test_tensors_that_are_not_the_models(tmp_path, architecture, change, message):
    weights = {**drawn(architecture), **change}
    source = tmp_path / "in"
    written(source, architecture, {k: v for k, v in weights.items() if v is not None})
    with pytest.raises(UserError, match=message):
        open_folder(source)


def test_a_head_that_config_json_promises_must_be_there(tmp_path):
    source = written(tmp_path / "in", "BertForMaskedLM", drawn("BertModel"))
    with pytest.raises(UserError, match=r"lacks 'cls.predictions.transform.dense.weight'"):
        open_folder(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, 'hidden_act is "relu"'),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"num_attention_heads": 5}, "dim 32 is no multiple of num_heads 5"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: must be at least 1"),
        ({"hidden_dropout_prob": 1.0}, "dropout is 1.0"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps is '1e-12', and should be a number"),
        ({"architectures": ["BertLMHeadModel"]}, "of bert only BertModel, BertForMaskedLM, "),
    ],
)
def test_settings_that_ours_cannot_compute(tmp_path, change, message):
    source = written(tmp_path / "in", "BertModel", drawn("BertModel"), **change)
    with pytest.raises(UserError, match=message):
        import_folder(source, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "architecture", [*CLASSES, "BertForSequenceClassification", "BertForNextSentencePrediction"]
)
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path, architecture):
    """Hidden states, pooled vectors and logits of its own files, and of ours in it."""
    import jax

    from lmjax.evaluate.embeddings import load
    from lmjax.ops.losses import logits

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**{**CONFIG, "architectures": [architecture]})
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    written(tmp_path / "in", "BertModel", {})  # its tokenizer
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    (tmp_path / "in" / "model.safetensors").unlink()
    tokens = np.random.default_rng(0).integers(0, folders.VOCAB, (2, 20))

    def theirs(model):
        with torch.no_grad():
            states = getattr(model, "bert", model)(torch.as_tensor(tokens))
            found = [states.last_hidden_state, states.pooler_output]
            if hasattr(model, "cls") and hasattr(model.cls, "predictions"):
                found.append(model.cls.predictions(states.last_hidden_state))
        return [None if x is None else x.numpy() for x in found]

    expected = theirs(model)
    import_folder(tmp_path / "in", tmp_path / "run")
    made = load(tmp_path / "run")
    output = jax.jit(made.model.apply)(made.variables, tokens)
    found = [output.hidden_BTD, output.pooled_BD]
    if output.unembedding is not None:
        found.append(logits(output.predicting_BTD, output.unembedding))
    assert [x is None for x in found] == [x is None for x in expected]
    for x, y in zip(found, expected, strict=True):
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    export_folder(tmp_path / "run", tmp_path / "out")
    predicting = output.unembedding is not None
    again, info = getattr(transformers, "BertForMaskedLM" if predicting else "BertModel")(
        config
    ).from_pretrained(tmp_path / "out", output_loading_info=True)
    pooled = predicting or output.pooled_BD is not None
    assert not info["mismatched_keys"] and (not info["missing_keys"] or not pooled)
    np.testing.assert_array_equal(theirs(again.eval())[0], expected[0])
    if predicting:
        np.testing.assert_array_equal(theirs(again)[-1], expected[-1])
