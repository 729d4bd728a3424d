"""GPT-2 in Hugging Face's names.

Source: `transformers.models.gpt2`. Its products keep weights as [in, out], as ours do; queries,
keys and values are one product, in this order.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from lmjax.config import call
from lmjax.convert.family import Family, Fields
from lmjax.convert.parts import Part, part
from lmjax.convert.settings import Settings
from lmjax.models.decoder import DecoderLM
from lmjax.models.gpt import gpt

EPSILON = 1e-5


def recorded(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a config.json; dropout is 0, which is no matter to its weights."""
    dim = settings.integer("n_embd", 768)
    settings.require("activation_function", "gelu_new", "gelu_pytorch_tanh")
    settings.require("layer_norm_epsilon", EPSILON)
    settings.require("n_inner", None, 4 * dim)
    settings.require("scale_attn_weights", True)
    settings.require("scale_attn_by_inverse_layer_idx", False)
    settings.require("tie_word_embeddings", True)
    settings.require("add_cross_attention", False)
    return call(
        gpt,
        num_layers=settings.integer("n_layer", 12),
        dim=dim,
        num_heads=settings.integer("n_head", 12),
        vocab_size=settings.integer("vocab_size", 50257),
        max_length=settings.integer("n_positions", 1024),
        dtype=dtype,
    )


def fields(model: DecoderLM) -> Fields:
    """config.json of a model."""
    stack = model.stacks[0]
    return {
        "n_layer": stack.num_layers,
        "n_embd": model.embed.dim,
        "n_head": stack.block.attention.num_heads,
        "n_inner": None,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_length,
        "layer_norm_epsilon": EPSILON,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def parts(settings: Settings) -> list[Part]:
    """Where each tensor lies in the arrays of `lmjax.models.gpt`."""
    dim, heads = settings.integer("n_embd", 768), settings.integer("n_head", 12)
    hidden, K = settings.integer("n_inner", 4 * dim), dim // heads
    vocab_size = settings.integer("vocab_size", 50257)
    block = "blocks/block"
    found = [
        part("transformer.wte.weight", "embed/table", (vocab_size, dim)),
        part(
            "transformer.wpe.weight",
            "positions/table",
            (settings.integer("n_positions", 1024), dim),
        ),
        part("transformer.ln_f.weight", "norm/scale", (dim,)),
        part("transformer.ln_f.bias", "norm/bias", (dim,)),
    ]
    for layer in range(settings.integer("n_layer", 12)):
        prefix, at = f"transformer.h.{layer}", (layer,)
        for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            for name, kind in (("weight", "scale"), ("bias", "bias")):
                found.append(
                    part(f"{prefix}.{theirs}.{name}", f"{block}/{ours}/{kind}", (dim,), at=at)
                )
        qkv, split = f"{prefix}.attn.c_attn", (3, heads, K)
        found += [
            part(
                f"{qkv}.weight",
                f"{block}/attention/qkv/kernel",
                (dim, 3 * dim),
                at=at,
                split=(dim, *split),
                axes=(0, 2, 1, 3),
            ),
            part(
                f"{qkv}.bias",
                f"{block}/attention/qkv/bias",
                (3 * dim,),
                at=at,
                split=split,
                axes=(1, 0, 2),
            ),
            part(
                f"{prefix}.attn.c_proj.weight",
                f"{block}/attention/out/kernel",
                (dim, dim),
                at=at,
                split=(heads, K, dim),
            ),
            part(f"{prefix}.attn.c_proj.bias", f"{block}/attention/out/bias", (dim,), at=at),
        ]
        for theirs, ours, sizes in (
            ("c_fc", "up", (dim, hidden)),
            ("c_proj", "down", (hidden, dim)),
        ):
            name, path = f"{prefix}.mlp.{theirs}", f"{block}/mlp/{ours}"
            found.append(part(f"{name}.weight", f"{path}/kernel", sizes, at=at))
            found.append(part(f"{name}.bias", f"{path}/bias", sizes[1:], at=at))
    return found


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    tied="transformer.wte.weight",
    buffers=r"\.attn\.(bias|masked_bias)$",
    recorded=recorded,
    fields=fields,
    parts=parts,
)
