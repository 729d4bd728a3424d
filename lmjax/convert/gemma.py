"""Gemma 2 and the text models of Gemma 3 in Hugging Face's names.

Source: `transformers.models.gemma2` and `gemma3`. Theirs are Llama's names and layouts, but for the
norms, of which a layer has four.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from lmjax.config import call
from lmjax.convert import rope
from lmjax.convert.family import Fields
from lmjax.convert.llama import attention, common, dense, family, layer_types, parts, window_layers
from lmjax.convert.parts import Part
from lmjax.convert.settings import Settings
from lmjax.models.decoder import DecoderLM
from lmjax.models.gemma import gemma

HEAD_DIM = 256  # where config.json names none, whatever the sizes
LOCAL, GLOBAL = "sliding_attention", "full_attention"
NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def _model(settings: Settings, caps: tuple[float | None, float | None], period: int) -> Any:
    """The arguments that the two generations share."""
    settings.require("hidden_activation", "gelu_pytorch_tanh", None)
    settings.require("use_bidirectional_attention", False, None)
    count = settings.integer("num_hidden_layers")
    layers = window_layers(settings, [layer % period != 0 for layer in range(1, count + 1)])
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    given = [settings.fields.get(name, cap) for name, cap in zip(names, caps, strict=True)]
    scores, logits = (  # null says that there is none
        None if cap is None else settings.number(name, cap)
        for name, cap in zip(names, given, strict=True)
    )
    settings = _with_head_dim(settings)
    return {
        **attention(settings),
        "hidden": settings.integer("intermediate_size"),
        "window": settings.integer("sliding_window", 4096),
        "window_layers": layers,
        "query_scale": settings.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": scores,
        "logit_softcap": logits,
        "tied": settings.boolean("tie_word_embeddings", True),
        "epsilon": settings.number("rms_norm_eps", 1e-6),
    }


def _with_head_dim(settings: Settings) -> Settings:
    return Settings(settings.source, {"head_dim": HEAD_DIM, **settings.fields})


def recorded_gemma2(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a Gemma 2's config.json."""
    return call(
        gemma,
        **_model(settings, (50.0, 30.0), period=2),
        rope_theta=rope.theta(settings, 10_000.0),
        rope_scaling=rope.recorded_scaling(settings),
        dtype=dtype,
    )


def recorded_gemma3(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a Gemma 3's config.json, of either spelling of its two rotations."""
    both = settings.part("rope_parameters")
    here, there = both.part(LOCAL), both.part(GLOBAL)
    scaled = there if there.fields else settings.part("rope_scaling")
    return call(
        gemma,
        **_model(settings, (None, None), settings.integer("sliding_window_pattern", 6)),
        qk_norm=True,
        window_rope_theta=here.number("rope_theta", settings.number("rope_local_base_freq", 1e4)),
        window_rope_scaling=rope.scaling_of(here, settings),
        rope_theta=there.number("rope_theta", settings.number("rope_theta", 1e6)),
        rope_scaling=rope.scaling_of(scaled, settings),
        dtype=dtype,
    )


def _fields(model: DecoderLM) -> Fields:
    heads = model.stacks[0].block.attention
    scalar = heads.head_dim if heads.query_scale is None else heads.query_scale**-2
    whole = round(scalar)  # transformers wants a whole number, which rounding must not lose
    found = {
        **common(model),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": heads.window,
        "layer_types": layer_types(model),
        "query_pre_attn_scalar": whole if whole**-0.5 == heads.query_scale else scalar,
        "attn_logit_softcapping": heads.softcap,
        "final_logit_softcapping": model.embed.softcap,
    }
    del found["hidden_act"]
    return found


def fields_gemma3(model: DecoderLM) -> Fields:
    """config.json of a Gemma 3; its rotations in the older spelling where that can say them."""
    heads, found = model.stacks[0].block.attention, _fields(model)
    if heads.window_rope.scaling is None:
        return {**found, "rope_local_base_freq": heads.window_rope.theta}
    both = {LOCAL: heads.window_rope, GLOBAL: heads.rope}
    found |= {"rope_parameters": {name: rope.parameters(r) for name, r in both.items()}}
    return {k: v for k, v in found.items() if k not in ("rope_theta", "rope_scaling")}


def _parts(settings: Settings) -> list[Part]:
    tied = {"tie_word_embeddings": True, **_with_head_dim(settings).fields}
    return parts(dense, Settings(settings.source, tied), norms=NORMS)


GEMMA2 = family(
    "gemma2",
    "Gemma2ForCausalLM",
    recorded=recorded_gemma2,
    fields=_fields,
    parts=_parts,
)
GEMMA3 = family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    recorded=recorded_gemma3,
    fields=fields_gemma3,
    parts=_parts,
)
