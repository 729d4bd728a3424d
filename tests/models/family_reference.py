"""Small decoders of Hugging Face transformers, to be agreed with; needs torch but not jax.

`python -m tests.models.family_reference [FAMILY ...]` (with the extra `parity`) writes
`FAMILY_reference.npz`: tokens, and the logits, loss and gradients of a model whose weights are
`weight(...)` of their names.
"""

import sys
import zlib
from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,  # else that row of the embedding gets no gradient
    "attn_implementation": "eager",
}
GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 14, "sliding_window": 5}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Family -> the prefix of its classes in transformers, the settings that are not in SIZES.
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 10}),
    "qwen2": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": {**YARN, "rope_theta": 300.0},
        },
    ),
    "qwen3": (
        "Qwen3",
        {
            "head_dim": 10,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 10,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            **GEMMA,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **GEMMA,
            "layer_types": [LOCAL, LOCAL, GLOBAL],
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 100.0},
                GLOBAL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            },
        },
    ),
}
LENGTH = 24
FIRST = 9  # tokens of the first of two documents in a row
PADDING = 7  # tokens that pad row 0 at its left


def weight(name, shape, *, unit_norms, seed=0):
    """A parameter that is far enough from its start, and the same on every machine."""
    random = np.random.RandomState(zlib.crc32(name.encode()) + seed)
    drawn = random.standard_normal(shape)
    if name.endswith("norm.weight"):
        return (0.2 * drawn + unit_norms).astype(np.float32)
    return (0.2 * drawn).astype(np.float32)


def unit_norms(family):
    """Where the weight of a norm that changes nothing lies."""
    return 0.0 if family.startswith("gemma") else 1.0


def measure(family, *, seed=0):
    """All that the reference holds, by name, as numpy arrays."""
    import torch
    import transformers

    prefix, settings = FAMILIES[family]
    part = "Text" if prefix == "Gemma3" else ""
    config = getattr(transformers, f"{prefix}{part}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = weight(name, parameter.shape, unit_norms=unit_norms(family), seed=seed)
            parameter.copy_(torch.from_numpy(drawn))
    tokens = np.random.RandomState(seed).randint(0, SIZES["vocab_size"], (3, LENGTH))
    output = model(torch.as_tensor(tokens), labels=torch.as_tensor(tokens))
    output.loss.backward()
    arrays = {"tokens": tokens, "logits": output.logits, "loss": output.loss}
    for name, parameter in model.named_parameters():
        arrays |= {f"gradient:{name}": parameter.grad}
    with torch.no_grad():
        parts = [model(torch.as_tensor(x)).logits for x in np.split(tokens, [FIRST], axis=1)]
        mask = np.ones_like(tokens)
        mask[0, :PADDING] = 0
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        padded = model(
            torch.as_tensor(tokens),
            attention_mask=torch.as_tensor(mask),
            position_ids=torch.as_tensor(positions),
        )
    arrays |= {"apart": torch.cat(parts, dim=1), "padded": padded.logits[0, PADDING:]}
    return {
        k: np.asarray(v if isinstance(v, np.ndarray) else v.detach()) for k, v in arrays.items()
    }


def path(family):
    """Where the reference of a family lies."""
    return Path(__file__).parent / f"{family}_reference.npz"


if __name__ == "__main__":
    for chosen in sys.argv[1:] or FAMILIES:
        np.savez_compressed(path(chosen), **measure(chosen))
