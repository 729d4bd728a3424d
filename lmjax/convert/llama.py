"""Llama, Mistral, Qwen 2 and 3 in Hugging Face's names.

Source: `transformers.models`, modules of these names. Its products keep weights as [out, in], ours
as [in, out]; queries, keys and values are three products, which ours join for each key-value head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from lmjax.config import call
from lmjax.convert import rope
from lmjax.convert.family import Family, Fields
from lmjax.convert.parts import Part, part
from lmjax.convert.settings import Settings
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderLM
from lmjax.models.llama import llama
from lmjax.models.mistral import mistral
from lmjax.models.qwen import qwen

BLOCK = "blocks/block"


def attention(settings: Settings) -> dict[str, Any]:
    """The arguments that these families share."""
    settings.require("attention_bias", False)
    settings.require("mlp_bias", False)
    settings.require("quantization_config", None)
    settings.require("partial_rotary_factor", 1.0, None)
    return {
        "num_layers": settings.integer("num_hidden_layers"),
        "dim": settings.integer("hidden_size"),
        "num_heads": settings.integer("num_attention_heads"),
        "num_kv_heads": kv_heads(settings),
        "head_dim": head_dim(settings),
        "vocab_size": settings.integer("vocab_size"),
        "max_length": settings.integer("max_position_embeddings", 2048),
    }


def dense_model(settings: Settings) -> dict[str, Any]:
    """Those of them with SwiGLU for an MLP."""
    settings.require("hidden_act", "silu")
    return {
        **attention(settings),
        "hidden": settings.integer("intermediate_size"),
        "rope_theta": rope.theta(settings, 10_000.0),
        "rope_scaling": rope.recorded_scaling(settings),
        "tied": settings.boolean("tie_word_embeddings", False),
        "epsilon": settings.number("rms_norm_eps", 1e-6),
    }


def recorded_llama(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a Llama's config.json."""
    return call(llama, **dense_model(settings), dtype=dtype)


def recorded_mistral(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a Mistral's config.json."""
    window = settings.get("sliding_window")
    return call(mistral, **dense_model(settings), window=window, dtype=dtype)


def recorded_qwen(kind: str, settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a config.json of Qwen 2 ('qwen2') or 3."""
    window = settings.integer("sliding_window", 4096)
    first, count = settings.integer("max_window_layers", 28), settings.integer("num_hidden_layers")
    layers = (False,) * count
    if settings.boolean("use_sliding_window", False):
        layers = window_layers(settings, [i >= first for i in range(count)])
    return call(
        qwen,
        **dense_model(settings),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        window=window if any(layers) else None,
        window_layers=layers if any(layers) else None,
        dtype=dtype,
    )


KINDS = ("full_attention", "sliding_attention")  # by whether a layer has the window


def window_layers(settings: Settings, default: Sequence[bool]) -> tuple[bool, ...]:
    """For each layer whether its attention has the window, `default` where they are not named."""
    named = settings.get("layer_types", [KINDS[windowed] for windowed in default])
    if not isinstance(named, list) or len(named) != len(default) or not set(named) <= set(KINDS):
        raise UserError(
            f"{settings.source}: layer_types is {named!r:.200}, and should name {KINDS[0]!r} or "
            f"{KINDS[1]!r} for each of {len(default)} layers."
        )
    return tuple(name == KINDS[1] for name in named)


def layer_types(model: DecoderLM) -> list[str]:
    """The same, as config.json has it."""
    heads, count = model.stacks[0].block.attention, model.stacks[0].num_layers
    layers = heads.window_layers or (heads.window is not None,) * count
    return [KINDS[windowed] for windowed in layers]


def common(model: DecoderLM) -> Fields:
    """The fields that the families share."""
    stack = model.stacks[0]
    heads = stack.block.attention
    return {
        "num_hidden_layers": stack.num_layers,
        "hidden_size": model.embed.dim,
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
        "intermediate_size": stack.block.mlp.hidden,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.norm.epsilon,
        "tie_word_embeddings": model.unembed is None,
        "hidden_act": "silu",
        "attention_bias": False,
        **rope.fields(heads.rope),
    }


def fields_llama(model: DecoderLM) -> Fields:
    """config.json of a Llama."""
    return {**common(model), "mlp_bias": False}


def fields_mistral(model: DecoderLM) -> Fields:
    """config.json of a Mistral."""
    return {**common(model), "sliding_window": model.stacks[0].block.attention.window}


def fields_qwen(model: DecoderLM) -> Fields:
    """config.json of a Qwen."""
    kinds = layer_types(model)
    return {
        **common(model),
        "use_sliding_window": KINDS[True] in kinds,
        "sliding_window": model.stacks[0].block.attention.window,
        "layer_types": kinds,
    }


def kv_heads(settings: Settings) -> int:
    """Heads of keys and values: all where none are given."""
    return settings.integer("num_key_value_heads", settings.integer("num_attention_heads"))


def head_dim(settings: Settings) -> int:
    """Of each head: what the heads share where none is given."""
    shared = settings.integer("hidden_size") // settings.integer("num_attention_heads")
    return settings.integer("head_dim", shared)


NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def parts(
    mlp: Callable[[Settings, int], list[Part]],
    settings: Settings,
    *,
    norms: Mapping[str, str] = NORMS,
) -> list[Part]:
    """Where each tensor lies in the arrays of `rotary_decoder`, the MLP's from `mlp`."""
    dim, vocab_size = settings.integer("hidden_size"), settings.integer("vocab_size")
    found = [
        part("model.embed_tokens.weight", "embed/table", (vocab_size, dim)),
        part("model.norm.weight", "norm/scale", (dim,)),
    ]
    if not settings.boolean("tie_word_embeddings", False):
        found.append(part("lm_head.weight", "unembed/table", (vocab_size, dim)))
    for layer in range(settings.integer("num_hidden_layers")):
        for theirs, ours in norms.items():
            name = f"model.layers.{layer}.{theirs}.weight"
            found.append(part(name, f"{BLOCK}/{ours}/scale", (dim,), at=(layer,)))
        found += attention_parts(settings, layer) + mlp(settings, layer)
    return found


def attention_parts(settings: Settings, layer: int) -> list[Part]:
    """The four products of one layer's attention, with the biases and norms of some families."""
    kind = settings.get("model_type")
    dim, K = settings.integer("hidden_size"), head_dim(settings)
    heads, G = settings.integer("num_attention_heads"), kv_heads(settings)
    R, prefix = heads // G, f"model.layers.{layer}.self_attn"
    found = []
    for name, start, count in (("q_proj", 0, R), ("k_proj", R, 1), ("v_proj", R + 1, 1)):
        found.append(
            part(
                f"{prefix}.{name}.weight",
                f"{BLOCK}/attention/qkv/kernel",
                (G * count * K, dim),
                at=(layer,),
                split=(G, count, K, dim),
                axes=(3, 0, 1, 2),
                where=((0, dim), (0, G), (start, start + count), (0, K)),
            )
        )
        if kind == "qwen2" or (kind == "qwen2_moe" and settings.boolean("qkv_bias", True)):
            found.append(
                part(
                    f"{prefix}.{name}.bias",
                    f"{BLOCK}/attention/qkv/bias",
                    (G * count * K,),
                    at=(layer,),
                    split=(G, count, K),
                    where=((0, G), (start, start + count), (0, K)),
                )
            )
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        for name in ("q_norm", "k_norm"):
            path = f"{BLOCK}/attention/{name}/scale"
            found.append(part(f"{prefix}.{name}.weight", path, (K,), at=(layer,)))
    found.append(
        part(
            f"{prefix}.o_proj.weight",
            f"{BLOCK}/attention/out/kernel",
            (dim, heads * K),
            at=(layer,),
            split=(dim, heads, K),
            axes=(1, 2, 0),
        )
    )
    return found


def dense(settings: Settings, layer: int) -> list[Part]:
    """A gated MLP."""
    dim, hidden = settings.integer("hidden_size"), settings.integer("intermediate_size")
    return [
        part(
            f"model.layers.{layer}.mlp.{name}_proj.weight",
            f"{BLOCK}/mlp/{name}/kernel",
            (dim, hidden) if name == "down" else (hidden, dim),
            at=(layer,),
            axes=(1, 0),
        )
        for name in ("gate", "up", "down")
    ]


def family(model_type: str, architecture: str, **arguments: Any) -> Family:
    """A family whose tensors are named as Llama's."""
    return Family(
        model_type=model_type,
        architecture=architecture,
        prefix="model.",
        tied="model.embed_tokens.weight",
        buffers=r"\.rotary_emb\.inv_freq$",
        **arguments,
    )


LLAMA = family(
    "llama",
    "LlamaForCausalLM",
    recorded=recorded_llama,
    fields=fields_llama,
    parts=partial(parts, dense),
)
MISTRAL = family(
    "mistral",
    "MistralForCausalLM",
    recorded=recorded_mistral,
    fields=fields_mistral,
    parts=partial(parts, dense),
)
QWEN2 = family(
    "qwen2",
    "Qwen2ForCausalLM",
    recorded=partial(recorded_qwen, "qwen2"),
    fields=fields_qwen,
    parts=partial(parts, dense),
)
QWEN3 = family(
    "qwen3",
    "Qwen3ForCausalLM",
    recorded=partial(recorded_qwen, "qwen3"),
    fields=fields_qwen,
    parts=partial(parts, dense),
)
