"""What is no whole model of a family is refused, by the tensor's name and what was expected."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmjax.config import build
from lmjax.convert.exports import described
from lmjax.convert.settings import Settings
from lmjax.convert.weights import FAMILIES, open_folder
from lmjax.errors import UserError
from tests.convert import folders
from tests.convert.folders import LLAMA

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def weights():
    return folders.drawn(LLAMA)


@pytest.fixture
def folder(tmp_path, weights):
    return folders.write(tmp_path / "in", LLAMA, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q: None}, rf"lacks '{Q}': .*config.json asks for '{Q}' of shape \[32, 32\]"),
        (
            {"model.extra.weight": np.ones(3, np.float32)},
            "has 'model.extra.weight', which no llama",
        ),
        (
            {Q: np.ones((32, 16), np.float32)},
            rf"'{Q}' has the shape \[32, 16\], and .*config.json asks for \[32, 32\]",
        ),
        ({Q: np.ones((32, 32), np.int64)}, rf"'{Q}' of .* is I64, .* one of F32, F16, BF16"),
        ({Q: np.ones((32, 32), np.float64)}, rf"'{Q}' of .* is F64"),
        ({"lm_head.weight": None}, "lacks 'lm_head.weight'"),
    ],
)
def test_tensors_that_are_not_the_models(folder, weights, change, message):
    changed = {**weights, **change}
    folders.write_weights(folder, {k: v for k, v in changed.items() if v is not None})
    with pytest.raises(UserError, match=message):
        open_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "falcon"}, "model_type is 'falcon', an architecture that lmjax cannot"),
        ({"model_type": None}, "model_type is ''"),
        ({"architectures": ["LlamaForTokenClassification"]}, "only LlamaForCausalLM"),
        ({"hidden_size": "32"}, "hidden_size is '32', and should be a whole number"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, and should be true or false"),
        ({"tie_word_embeddings": True}, "lm_head.weight is another table than the token embedding"),
        ({"num_hidden_layers": 4}, "lacks 'model.layers.3.input_layernorm.weight'"),
        ({"num_hidden_layers": 2}, "has 'model.layers.2.input_layernorm.weight'"),
    ],
)
def test_settings_that_are_not_the_weights(folder, change, message):
    (folder / "config.json").write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(UserError, match=message):
        open_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, 'hidden_act is "relu", and only "silu" can be converted'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1.0 or null"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope', .* yarn. Take a"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic', .* take it out"),
        ({"rope_scaling": {"type": "yarm"}}, "rope_type is 'yarm', .* Did you mean 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor is None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ],
)
def test_settings_that_ours_cannot_compute(change, message):
    with pytest.raises(UserError, match=message):
        FAMILIES["llama"].recorded(Settings("config.json", {**LLAMA, **change}), "float32")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, 'hidden_activation is "gelu", and only "gelu_py'),
        ("gemma2", {"attention_bias": True}, "attention_bias is true"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma2", {"layer_types": ["full_attention"]}, "for each of 3 layers"),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
            "rope_parameters: full_attention: rope_type is 'dynamic'",
        ),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1, and should be true or false"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, r"mlp_only_layers is \[3\], .* each from 0 to 2"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, and at least 1"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "intermediate_size is None"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("qwen2_moe", {"shared_expert_intermediate_size": "8"}, "shared_expert_.* whole number"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("qwen3_moe", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ("mixtral", {"sliding_window": 8}, "sliding_window is 8, and only null"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types is .* each of 3 layers"),
    ],
)
def test_settings_of_other_families(family, change, message):
    config = {**folders.CONFIGS[family], **change}
    with pytest.raises(UserError, match=message):
        FAMILIES[config["model_type"]].recorded(Settings("config.json", config), "float32")


def test_what_absent_settings_mean():
    """What published files leave to the defaults of transformers."""
    config = {k: v for k, v in folders.GEMMA2.items() if not k.endswith("softcapping")}
    del config["layer_types"]
    found = FAMILIES["gemma2"].recorded(Settings("config.json", config), "float32")
    assert (found.attention_softcap, found.logit_softcap) == (50.0, 30.0)
    assert found.window_layers == (True, False, True)
    null = {**config, "attn_logit_softcapping": None}
    found = FAMILIES["gemma2"].recorded(Settings("config.json", null), "float32")
    assert found.attention_softcap is None
    config = {k: v for k, v in folders.GEMMA3.items() if not k.startswith(("rope", "layer_types"))}
    config |= {"num_hidden_layers": 7}
    found = FAMILIES["gemma3_text"].recorded(Settings("config.json", config), "float32")
    assert found.window_layers == (True,) * 5 + (False, True)
    assert (found.rope_theta, found.window_rope_theta) == (1e6, 1e4)
    newer = {
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0},
    }
    settings = Settings("config.json", {**config, "rope_parameters": newer})
    model = build(FAMILIES["gemma3_text"].recorded(settings, "float32"))
    assert model.stacks[0].block.attention.window_rope.scaling.factor == 2.0
    family, fields = described(model)
    assert (family.model_type, fields["rope_parameters"]) == ("gemma3_text", newer)


def test_which_layers_are_mixtures():
    """Every second of those that are not named, counted from 1; published files say neither."""
    config = {**folders.QWEN2_MOE, "num_hidden_layers": 6, "mlp_only_layers": [3]}
    config |= {"decoder_sparse_step": 2}
    settings = Settings("config.json", config)
    model = build(FAMILIES["qwen2_moe"].recorded(settings, "float32"))
    assert [type(stack.block.mlp).__name__ for stack in model.stacks] == [
        "SwiGlu", "Moe", "SwiGlu", "Moe",
    ]  # fmt: skip
    assert [stack.num_layers for stack in model.stacks] == [1, 1, 3, 1]
    family, fields = described(model)
    assert (family.model_type, fields["mlp_only_layers"]) == ("qwen2_moe", [0, 2, 3, 4])
    for name in ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "intermediate_size"):
        del config[name]
    found = FAMILIES["qwen2_moe"].recorded(Settings("config.json", config), "float32")
    assert (found.mixture_layers, found.dense_hidden, found.normalise) == (None, None, False)


def test_a_tied_output_layer_may_be_stored_twice(tmp_path):
    config = {**LLAMA, "tie_word_embeddings": True}
    weights = folders.drawn(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    found = open_folder(folders.write(tmp_path / "in", config, weights))
    assert "unembed/table" not in found.arrays


def test_names_of_a_model_without_its_head_and_buffers(tmp_path):
    weights = folders.drawn(folders.GPT2)
    bare = {k.removeprefix("transformer."): v for k, v in weights.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 24, 24), np.uint8)
    found = open_folder(folders.write(tmp_path / "in", folders.GPT2, bare))
    (_, block), *_ = found.blocks("positions/table")
    np.testing.assert_array_equal(block, weights["transformer.wpe.weight"])


@pytest.mark.parametrize("length", [0, 7, 8, 200, -1, -8])
def test_truncated_shards(folder, length):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:length])
    message = f"{re.escape(str(path))} is (no whole|truncated: its tensor)"
    with pytest.raises(UserError, match=message):
        open_folder(folder)


def test_a_shard_that_is_missing_or_lacks_a_tensor(tmp_path, weights):
    folder = folders.write(tmp_path / "in", LLAMA, weights, num_shards=2)
    name = next(iter(weights))
    shard = folder / "model-00001-of-00002.safetensors"
    part = {k: v for i, (k, v) in enumerate(weights.items()) if i % 2 == 0 and k != name}
    save_file(part, shard)
    with pytest.raises(
        UserError, match=f"lacks the tensor '{name}', which model.safetensors.index"
    ):
        open_folder(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"there is no .*00001-of-00002.safetensors"):
        open_folder(folder)


def header(entries, size):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * size


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12), "begins at"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4), "entry of 'a'"),
        (header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, 8), "entry of 'a'"),
        (header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8), "entry of 'a'"),
        (header({"a": 3}, 8), "entry of 'a'"),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9),
            "tensors end at",
        ),
        (header([], 0), "holds no names"),
        (b"\xff" * 64, "header of 18446744073709551615 bytes"),
        (b"{" * 64, "no whole safetensors"),
    ],
)
def test_damaged_headers(folder, data, message):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_folder(folder)


def test_damaged_indexes(tmp_path, weights):
    folder = folders.write(tmp_path / "in", LLAMA, weights, num_shards=2)
    index = folder / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index.json is damaged"):
            open_folder(folder)
    index.unlink()
    with pytest.raises(UserError, match=r"2 files \*.safetensors and no model.safet"):
        open_folder(folder)
