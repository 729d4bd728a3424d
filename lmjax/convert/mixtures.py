"""Mixtral and the mixtures of Qwen 3 in Hugging Face's names.

Source: `transformers.models.mixtral` and `qwen3_moe`: Llama's attention, and in the place of the
MLP a router and experts, each of whose products is a tensor of its own in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from lmjax.config import call
from lmjax.convert import rope
from lmjax.convert.family import Fields
from lmjax.convert.llama import BLOCK, attention, common, family, parts
from lmjax.convert.parts import Part, part
from lmjax.convert.settings import Settings
from lmjax.layers.moe import Moe
from lmjax.models.decoder import DecoderLM
from lmjax.models.moe import moe


def _model(settings: Settings, theta: float, epsilon: float) -> dict[str, Any]:
    settings.require("hidden_act", "silu")
    settings.require("tie_word_embeddings", False)
    return {
        **attention(settings),
        "rope_theta": rope.theta(settings, theta),
        "rope_scaling": rope.recorded_scaling(settings),
        "epsilon": settings.number("rms_norm_eps", epsilon),
    }


def recorded_mixtral(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a Mixtral's config.json."""
    settings.require("sliding_window", None)
    return call(
        moe,
        **_model(settings, 1e6, 1e-5),
        num_experts=settings.integer("num_local_experts", 8),
        experts_per_token=settings.integer("num_experts_per_tok", 2),
        expert_hidden=settings.integer("intermediate_size"),
        dtype=dtype,
    )


def recorded_qwen3(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a config.json of Qwen 3's mixtures."""
    settings.require("use_sliding_window", False, None)
    settings.require("mlp_only_layers", [], None)
    settings.require("decoder_sparse_step", 1, None)
    normalised = Settings(settings.source, {"norm_topk_prob": False, **settings.fields})
    normalised.require("norm_topk_prob", True)  # where it is absent, transformers has false
    return call(
        moe,
        **_model(settings, 10_000.0, 1e-6),
        num_experts=_experts(settings),
        experts_per_token=settings.integer("num_experts_per_tok", 8),
        expert_hidden=settings.integer("moe_intermediate_size", 768),
        qk_norm=True,
        dtype=dtype,
    )


def _experts(settings: Settings) -> int:
    """How many a layer of Qwen 3's has, of which newer files speak by another name."""
    return settings.integer("num_experts", settings.integer("num_local_experts", 128))


def fields_mixtral(model: DecoderLM) -> Fields:
    """config.json of a Mixtral."""
    mlp: Moe = model.stacks[0].block.mlp
    return {
        **common(model),
        "num_local_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.experts_per_token,
        "sliding_window": None,
    }


def fields_qwen3(model: DecoderLM) -> Fields:
    """config.json of a mixture of Qwen 3's."""
    mlp: Moe = model.stacks[0].block.mlp
    return {
        **{name: value for name, value in common(model).items() if name != "intermediate_size"},
        "num_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.experts_per_token,
        "moe_intermediate_size": mlp.hidden,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _mixture(
    settings: Settings,
    layer: int,
    *,
    module: str,
    names: Mapping[str, str],
    experts: int,
    hidden: int,
) -> list[Part]:
    """A router and its experts, whose products are `names`, by ours."""
    dim, path = settings.integer("hidden_size"), f"{BLOCK}/mlp"
    prefix = f"model.layers.{layer}.{module}"
    router = f"{prefix}.gate.weight"
    found = [part(router, f"{path}/router_kernel", (experts, dim), at=(layer,), axes=(1, 0))]
    for expert in range(experts):
        for ours, theirs in names.items():
            found.append(
                part(
                    f"{prefix}.experts.{expert}.{theirs}.weight",
                    f"{path}/{ours}_kernel",
                    (dim, hidden) if ours == "down" else (hidden, dim),
                    at=(layer, expert),
                    axes=(1, 0),
                )
            )
    return found


def mixture_mixtral(settings: Settings, layer: int) -> list[Part]:
    """One layer's experts of a Mixtral."""
    return _mixture(
        settings,
        layer,
        module="block_sparse_moe",
        names={"gate": "w1", "down": "w2", "up": "w3"},
        experts=settings.integer("num_local_experts", 8),
        hidden=settings.integer("intermediate_size"),
    )


def mixture_qwen3(settings: Settings, layer: int) -> list[Part]:
    """One layer's experts of Qwen 3's."""
    return _mixture(
        settings,
        layer,
        module="mlp",
        names={name: f"{name}_proj" for name in ("gate", "up", "down")},
        experts=_experts(settings),
        hidden=settings.integer("moe_intermediate_size", 768),
    )


MIXTRAL = family(
    "mixtral",
    "MixtralForCausalLM",
    recorded=recorded_mixtral,
    fields=fields_mixtral,
    parts=partial(parts, mixture_mixtral),
)
QWEN3_MOE = family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    recorded=recorded_qwen3,
    fields=fields_qwen3,
    parts=partial(parts, mixture_qwen3),
)
