"""Mixtral and the mixtures of Qwen 1.5, 2 and 3 in Hugging Face's names.

Source: `transformers.models.mixtral`, `qwen2_moe` (Qwen 1.5's and 2's) and `qwen3_moe`: Llama's
attention, and in the place of the MLP a router and experts, each of whose products is a tensor of
its own in the files. Layers of Qwen's may be dense: ours are then a stack for each run of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from ml_collections import ConfigDict

from lmjax.config import call
from lmjax.convert import rope
from lmjax.convert.family import Fields
from lmjax.convert.llama import BLOCK, attention, common, dense, family, parts
from lmjax.convert.parts import Part, part
from lmjax.convert.settings import Settings
from lmjax.errors import UserError
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


def recorded_qwen2(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a config.json of Qwen 1.5's and 2's mixtures."""
    return call(
        moe,
        **_qwen(settings),
        experts_per_token=settings.integer("num_experts_per_tok", 4),
        shared_hidden=_shared(settings),
        gated_shared=True,
        qkv_bias=settings.boolean("qkv_bias", True),
        dtype=dtype,
    )


def recorded_qwen3(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a config.json of Qwen 3's mixtures."""
    return call(
        moe,
        **_qwen(settings),
        experts_per_token=settings.integer("num_experts_per_tok", 8),
        qk_norm=True,
        dtype=dtype,
    )


def _qwen(settings: Settings) -> dict[str, Any]:
    """The arguments that Qwen's mixtures share."""
    settings.require("use_sliding_window", False, None)
    mixtures = _mixtures(settings)
    return {
        **_model(settings, 10_000.0, 1e-6),
        "num_experts": _experts(settings),
        "expert_hidden": _expert_hidden(settings),
        "normalise": settings.boolean("norm_topk_prob", False),
        "mixture_layers": None if all(mixtures) else mixtures,
        "dense_hidden": None if all(mixtures) else settings.integer("intermediate_size"),
    }


def _experts(settings: Settings) -> int:
    """How many a layer of Qwen's has, of which newer files speak by another name."""
    default = 60 if settings.get("model_type") == "qwen2_moe" else 128
    return settings.integer("num_experts", settings.integer("num_local_experts", default))


def _expert_hidden(settings: Settings) -> int:
    default = 1408 if settings.get("model_type") == "qwen2_moe" else 768
    return settings.integer("moe_intermediate_size", default)


def _shared(settings: Settings) -> int:
    return settings.integer("shared_expert_intermediate_size", 5632)


def _mixtures(settings: Settings) -> tuple[bool, ...]:
    """For each layer of Qwen's whether it is a mixture."""
    count = settings.integer("num_hidden_layers")
    step = settings.integer("decoder_sparse_step", 1)
    dense_layers = settings.get("mlp_only_layers", [])
    if not (isinstance(dense_layers, list) and all(i in range(count) for i in dense_layers)):
        raise UserError(
            f"{settings.source}: mlp_only_layers is {dense_layers!r:.200}, and should be a list of "
            f"layers, each from 0 to {count - 1}."
        )
    if step < 1:
        raise UserError(f"{settings.source}: decoder_sparse_step is {step}, and at least 1 works.")
    return tuple(i not in dense_layers and (i + 1) % step == 0 for i in range(count))


def fields_mixtral(model: DecoderLM) -> Fields:
    """config.json of a Mixtral."""
    mlp: Moe = model.stacks[0].block.mlp
    return {
        **common(model),
        "num_local_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.experts_per_token,
        "sliding_window": None,
    }


def fields_qwen2(model: DecoderLM) -> Fields:
    """config.json of a mixture of Qwen 1.5's and 2's."""
    return {
        **fields_qwen3(model),
        "shared_expert_intermediate_size": _moe(model).shared_hidden,
        "qkv_bias": model.stacks[0].block.attention.use_bias,
    }


def fields_qwen3(model: DecoderLM) -> Fields:
    """config.json of a mixture of Qwen 3's."""
    mixture = _moe(model)
    layers = [stack.block.mlp for stack in model.stacks for _ in range(stack.num_layers)]
    dense_layers = [i for i, mlp in enumerate(layers) if not isinstance(mlp, Moe)]
    found = {**common(model), "num_hidden_layers": len(layers)}
    del found["intermediate_size"]
    if dense_layers:
        found["intermediate_size"] = layers[dense_layers[0]].hidden
    return {
        **found,
        "num_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.experts_per_token,
        "moe_intermediate_size": mixture.hidden,
        "norm_topk_prob": mixture.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers,
        "use_sliding_window": False,
    }


def _moe(model: DecoderLM) -> Moe:
    """The first mixture of a model; raises UserError where it has none."""
    for stack in model.stacks:
        if isinstance(stack.block.mlp, Moe):
            return stack.block.mlp
    raise UserError("the model has no mixture of experts.")


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


PRODUCTS = {name: f"{name}_proj" for name in ("gate", "up", "down")}


def mixture_qwen3(settings: Settings, layer: int) -> list[Part]:
    """One layer's experts of Qwen 3's, or its dense MLP."""
    if not _mixtures(settings)[layer]:
        return dense(settings, layer)
    sizes = {"experts": _experts(settings), "hidden": _expert_hidden(settings)}
    return _mixture(settings, layer, module="mlp", names=PRODUCTS, **sizes)


def mixture_qwen2(settings: Settings, layer: int) -> list[Part]:
    """The same of Qwen 1.5's and 2's, with its shared experts and their gate."""
    found = mixture_qwen3(settings, layer)
    if not _mixtures(settings)[layer]:
        return found
    dim, path, prefix = settings.integer("hidden_size"), f"{BLOCK}/mlp", f"model.layers.{layer}.mlp"
    for ours, theirs in PRODUCTS.items():
        found.append(
            part(
                f"{prefix}.shared_expert.{theirs}.weight",
                f"{path}/shared/{ours}/kernel",
                (dim, _shared(settings)) if ours == "down" else (_shared(settings), dim),
                at=(layer,),
                axes=(1, 0),
            )
        )
    gate = f"{prefix}.shared_expert_gate.weight"
    found.append(part(gate, f"{path}/shared_gate", (1, dim), at=(layer,), axes=(1, 0)))
    return found


def parts_qwen(mlp: Callable[[Settings, int], list[Part]], settings: Settings) -> list[Part]:
    """As `llama.parts`, the layers in stacks where some are dense."""
    found, mixtures = parts(mlp, settings), _mixtures(settings)
    if all(mixtures):
        return found
    places = []  # of each layer: (its stack, its place there)
    for stack, (_, run) in enumerate(groupby(mixtures)):
        places += [(stack, i) for i, _ in enumerate(run)]
    return [_placed(p, places) for p in found]


def _placed(p: Part, places: Sequence[tuple[int, int]]) -> Part:
    """A part of a layer, in its stack."""
    if not p.path.startswith(f"{BLOCK}/"):
        return p
    stack, i = places[p.where[0][0]]
    path = p.path.replace(BLOCK, BLOCK.replace("/", f"/parts_{stack}/"), 1)
    return replace(p, path=path, where=((i, i + 1), *p.where[1:]))


MIXTRAL = family(
    "mixtral",
    "MixtralForCausalLM",
    recorded=recorded_mixtral,
    fields=fields_mixtral,
    parts=partial(parts, mixture_mixtral),
)
QWEN2_MOE = family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    recorded=recorded_qwen2,
    fields=fields_qwen2,
    parts=partial(parts_qwen, mixture_qwen2),
)
QWEN3_MOE = family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    recorded=recorded_qwen3,
    fields=fields_qwen3,
    parts=partial(parts_qwen, mixture_qwen3),
)
