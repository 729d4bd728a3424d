"""T5 in Hugging Face's names: equal to the bit both ways, and to transformers where it is there."""

import json

import numpy as np
import pytest

from lmjax.convert.exports import export_folder
from lmjax.convert.imports import import_folder
from lmjax.convert.weights import open_folder
from lmjax.errors import UserError
from tests.convert import folders
from tests.convert.test_convert import read_shards, stored_arrays
from tests.models import t5_reference

V11 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    **t5_reference.CONFIG,
    **t5_reference.KINDS["v1.1"],
    "vocab_size": folders.VOCAB,
    "eos_token_id": 256,
}
V10 = {**V11, **t5_reference.KINDS["v1.0"]}


def shapes(config):
    """The tensors of a folder, by name."""
    D, E = config["d_model"], config["num_heads"] * config["d_kv"]
    found = {"shared.weight": (config["vocab_size"], D)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], D)
    gated = config["feed_forward_proj"] == "gated-gelu"
    for side, count in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found[bias] = (config["relative_attention_num_buckets"], config["num_heads"])
        found[f"{side}.final_layer_norm.weight"] = (D,)
        names = ["SelfAttention", "EncDecAttention", "DenseReluDense"]
        for layer in range(config[count]):
            for i, name in enumerate(names if side == "decoder" else names[::2]):
                prefix = f"{side}.block.{layer}.layer.{i}"
                found[f"{prefix}.layer_norm.weight"] = (D,)
                products = {"q": (E, D), "k": (E, D), "v": (E, D), "o": (D, E)}
                if name == "DenseReluDense":
                    up = (config["d_ff"], D)
                    products = {"wi_0": up, "wi_1": up} if gated else {"wi": up}
                    products["wo"] = up[::-1]
                found |= {f"{prefix}.{name}.{x}.weight": shape for x, shape in products.items()}
    return found


def drawn(config, dtype=np.float32):
    return {k: t5_reference.weight(k, shape).astype(dtype) for k, shape in shapes(config).items()}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(V11, folders.BF16), pytest.param(V10, np.float32, marks=pytest.mark.slow)],
)
def test_import_is_the_mapping_and_export_is_its_inverse(tmp_path, config, dtype):
    weights = drawn(config, dtype)
    source = folders.write(tmp_path / "in", config, weights, num_shards=2)
    import_folder(source, tmp_path / "run")
    found, wanted = stored_arrays(tmp_path / "run"), t5_reference.from_torch_names(weights)
    assert found.keys() == wanted.keys()
    for path, array in found.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, wanted[path], err_msg=path)
    export_folder(tmp_path / "run", tmp_path / "out")
    back = read_shards(tmp_path / "out")
    assert back.keys() == weights.keys()
    for name, array in back.items():
        assert (array.dtype, array.shape) == (weights[name].dtype, weights[name].shape)
        assert array.tobytes() == weights[name].tobytes(), name
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: again[name] for name in config} == config


def test_copies_of_the_embedding_are_those_or_refused(tmp_path):
    """And early files hold a table that nothing reads."""
    weights, shared = drawn(V10), "shared.weight"
    more = {"encoder.embed_tokens.weight": weights[shared], "lm_head.weight": weights[shared]}
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more[unread] = np.zeros((8, 3), np.float32)
    folder = folders.write(tmp_path / "same", V10, weights | more)
    assert open_folder(folder).tensors.keys() == weights.keys()
    for name in ("encoder.embed_tokens.weight", "lm_head.weight"):
        other = weights | {name: 2 * weights[shared]}
        folder = folders.write(tmp_path / name, V10, other)
        with pytest.raises(UserError, match=f"its {name} is another table than the token emb"):
            open_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, 'feed_forward_proj is "gated-silu"'),
        ({"d_kv": 5}, r"q.weight' has the shape \[18, 16\], and .* asks for \[15, 16\]"),
        ({"num_decoder_layers": 4}, "lacks 'decoder.block.3.layer.0.layer_norm.weight'"),
        ({"tie_word_embeddings": True}, "its lm_head.weight is another table"),
        ({"architectures": ["T5EncoderModel"]}, "only T5ForConditionalGeneration can be conv"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(tmp_path, change, message):
    folder = folders.write(tmp_path / "in", {**V11, **change}, drawn(V11))
    with pytest.raises(UserError, match=message):
        open_folder(folder)


def test_transformers_5_says_by_another_field_that_the_output_layer_is_its_own(tmp_path):
    told = {**V11, "tie_word_embeddings": True, "scale_decoder_outputs": False}
    folder = folders.write(tmp_path / "in", told, drawn(V11))
    assert "lm_head.weight" in open_folder(folder).tensors


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", t5_reference.KINDS)
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path, kind):
    import jax

    from lmjax.generate.language_model import load
    from lmjax.ops.losses import logits

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {name: V11[name] for name in ("vocab_size", "eos_token_id")}
    made, donor = t5_reference.model_of(kind, **sizes), folders.write(tmp_path / "donor", V10, {})
    made.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).write_bytes((donor / name).read_bytes())
    random = np.random.default_rng(0)
    source, tokens = (torch.as_tensor(random.integers(0, 37, (2, n))) for n in (19, 14))
    given = {"input_ids": source, "decoder_input_ids": tokens}
    with torch.no_grad():
        expected = made(**given).logits.numpy()
    import_folder(tmp_path / "in", tmp_path / "run")
    lm = load(tmp_path / "run")
    output = jax.jit(lm.model.apply)(lm.variables, tokens.numpy(), source_BM=source.numpy())
    found = logits(output.hidden_BTD, output.unembedding)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    export_folder(tmp_path / "run", tmp_path / "out")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    was = {k: x for k, x in read_shards(tmp_path / "in").items() if k not in copies}
    written = read_shards(tmp_path / "out")
    assert was.keys() == written.keys()
    assert all(was[name].tobytes() == written[name].tobytes() for name in was)
    again, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        np.testing.assert_allclose(again(**given).logits.numpy(), expected, rtol=0, atol=1e-6)
