"""Hugging Face folders at random weights, written without lmjax, and the same in our arrays."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.models import gpt2_reference, llama_reference

END = "<|endoftext|>"
VOCAB = 261
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 256,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 24,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "eos_token_id": 256,
}
MIXTRAL = {
    **{k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")},
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
_PLAIN = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
MISTRAL = {
    **_PLAIN,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 8,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}
QWEN2 = {
    **_PLAIN,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
QWEN3 = {
    **_PLAIN,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,
    "rope_theta": 1e6,
}
_GEMMA = {
    **_PLAIN,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 12,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
del _GEMMA["hidden_act"]
GEMMA2 = {
    **_GEMMA,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA3 = {
    **_GEMMA,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_local_base_freq": 100.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
QWEN3_MOE = {
    **{k: v for k, v in _PLAIN.items() if k != "intermediate_size"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
QWEN2_MOE = {
    **_PLAIN,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "norm_topk_prob": False,
    "mlp_only_layers": [1],
}
CONFIGS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True, "head_dim": 16},
    "mixtral": MIXTRAL,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}


def shapes(config):
    """The tensors of a folder, by name."""
    if config["model_type"] == "gpt2":
        D, V = config["n_embd"], config["vocab_size"]
        found = {"wte.weight": (V, D), "wpe.weight": (config["n_positions"], D)}
        found |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
        for i in range(config["n_layer"]):
            for name, (rows, columns) in {
                "attn.c_attn": (D, 3 * D),
                "attn.c_proj": (D, D),
                "mlp.c_fc": (D, 4 * D),
                "mlp.c_proj": (4 * D, D),
            }.items():
                found |= {f"h.{i}.{name}.weight": (rows, columns), f"h.{i}.{name}.bias": (columns,)}
            for name in ("ln_1", "ln_2"):
                found |= {f"h.{i}.{name}.weight": (D,), f"h.{i}.{name}.bias": (D,)}
        return {f"transformer.{name}": shape for name, shape in found.items()}
    D, V, kind = config["hidden_size"], config["vocab_size"], config["model_type"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    K = config.get("head_dim", D // heads)
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (heads * K, D),
            "self_attn.k_proj": (kv * K, D),
            "self_attn.v_proj": (kv * K, D),
            "self_attn.o_proj": (D, heads * K),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            layer |= {"self_attn.q_norm": (K,), "self_attn.k_norm": (K,)}
        if kind.startswith("gemma"):
            layer |= {"pre_feedforward_layernorm": (D,), "post_feedforward_layernorm": (D,)}
        if has_experts(config, i):
            experts, module, products = mixture(config)
            F = config.get("moe_intermediate_size", config.get("intermediate_size"))
            layer[f"{module}.gate"] = (experts, D)
            for e in range(experts):
                for name, shape in zip(products, ((F, D), (F, D), (D, F)), strict=True):
                    layer[f"{module}.experts.{e}.{name}"] = shape
            if kind == "qwen2_moe":
                S, shared = config["shared_expert_intermediate_size"], f"{module}.shared_expert"
                layer |= {f"{shared}.gate_proj": (S, D), f"{shared}.up_proj": (S, D)}
                layer |= {f"{shared}.down_proj": (D, S), f"{shared}_gate": (1, D)}
        else:
            F = config["intermediate_size"]
            layer |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if kind in ("qwen2", "qwen2_moe"):
            for name, size in (("q", heads * K), ("k", kv * K), ("v", kv * K)):
                found[f"model.layers.{i}.self_attn.{name}_proj.bias"] = (size,)
    return found


def has_experts(config, layer):
    return "num_experts_per_tok" in config and layer not in config.get("mlp_only_layers", ())


def mixture(config):
    """(how many experts, the name of their module, of its products gate, up and down)."""
    if config["model_type"] == "mixtral":
        return config["num_local_experts"], "block_sparse_moe", ("w1", "w3", "w2")
    return config["num_experts"], "mlp", ("gate_proj", "up_proj", "down_proj")


def drawn(config, dtype=np.float32, seed=0):
    """Random weights, away from the start of training."""
    random = np.random.default_rng(seed)
    return {
        name: (0.2 * random.normal(size=shape) + name.endswith("norm.weight")).astype(dtype)
        for name, shape in shapes(config).items()
    }


def ours(config, weights):
    """The same in our arrays, by the mapping of the reference tests of the models."""
    if config["model_type"] == "gpt2":
        return gpt2_reference.from_torch_names(weights, num_heads=config["n_head"])
    weights = dict(weights)
    for i in range(config["num_hidden_layers"]):
        if not has_experts(config, i):
            continue
        count, module, products = mixture(config)
        moe, mlp = f"model.layers.{i}.{module}", f"model.layers.{i}.mlp"
        gate, up, down = (
            np.stack([weights.pop(f"{moe}.experts.{e}.{name}.weight") for e in range(count)])
            for name in products
        )
        weights[f"{mlp}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        weights[f"{mlp}.experts.down_proj"] = down
        weights[f"{mlp}.gate.weight"] = weights.pop(f"{moe}.gate.weight")
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    return llama_reference.from_torch_names(weights, num_heads=heads, num_kv_heads=kv)


def write(folder, config, weights, *, num_shards=1):
    """A folder as save_pretrained writes it, with a tokenizer of bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, weights, num_shards=num_shards)
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def write_weights(folder, weights, *, num_shards=1):
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, index = list(weights), {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[i::num_shards]}, folder / file)
        index |= dict.fromkeys(names[i::num_shards], file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def byte_vocabulary():
    return {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


BF16 = ml_dtypes.bfloat16
