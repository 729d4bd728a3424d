"""T5, T5 v1.1 and FLAN-T5 in Hugging Face's names.

Source: `transformers.models.t5`. Its products keep weights as [out, in], ours as [in, out]; the
table of a stack's position bias lies in its first layer.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from lmjax.config import call
from lmjax.convert.family import Family, Fields
from lmjax.convert.parts import Part, part
from lmjax.convert.settings import Settings
from lmjax.errors import UserError
from lmjax.layers.mlp import GeGlu
from lmjax.models.encoder_decoder import EncoderDecoderLM
from lmjax.models.t5 import t5

PROJECTIONS = {"relu": False, "gated-gelu": True}  # name of the MLP there: whether it is gated


def recorded(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a config.json; dropout is 0, which is no matter to its weights."""
    settings.require("is_encoder_decoder", True)
    settings.require("quantization_config", None)
    return call(
        t5,
        num_layers=settings.integer("num_layers", 6),
        num_decoder_layers=_decoder_layers(settings),
        dim=settings.integer("d_model", 512),
        num_heads=settings.integer("num_heads", 8),
        head_dim=settings.integer("d_kv", 64),
        hidden=settings.integer("d_ff", 2048),
        vocab_size=settings.integer("vocab_size", 32128),
        max_length=settings.integer("n_positions", 512),
        gated=_gated(settings),
        tied=_tied(settings),
        num_buckets=settings.integer("relative_attention_num_buckets", 32),
        max_distance=settings.integer("relative_attention_max_distance", 128),
        start_id=settings.integer("decoder_start_token_id", settings.integer("pad_token_id", 0)),
        epsilon=settings.number("layer_norm_epsilon", 1e-6),
        dtype=dtype,
    )


def _decoder_layers(settings: Settings) -> int:
    return settings.integer("num_decoder_layers", settings.integer("num_layers", 6))


def _gated(settings: Settings) -> bool:
    settings.require("feed_forward_proj", *PROJECTIONS)
    return PROJECTIONS[settings.get("feed_forward_proj", "relu")]


def _tied(settings: Settings) -> bool:
    """Whether the output layer is the token embedding, and its input scaled: the one means both.

    transformers 5 may write `tie_word_embeddings` true of what is not tied, and tells by the other.
    """
    tied = settings.boolean("tie_word_embeddings", True)
    return settings.boolean("scale_decoder_outputs", tied)


def fields(model: EncoderDecoderLM) -> Fields:
    """config.json of a model."""
    if not isinstance(model, EncoderDecoderLM) or model.decoder_bias is None:
        raise UserError("the model is no T5.")
    heads, mlp = model.decoder.block.attention, model.decoder.block.mlp
    gated, tied = isinstance(mlp, GeGlu), model.unembed is None
    return {
        "num_layers": model.encoder.num_layers,
        "num_decoder_layers": model.decoder.num_layers,
        "d_model": model.embed.dim,
        "num_heads": heads.num_heads,
        "d_kv": heads.head_dim,
        "d_ff": mlp.hidden,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_length,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": tied,
        "relative_attention_num_buckets": model.decoder_bias.num_buckets,
        "relative_attention_max_distance": model.decoder_bias.max_distance,
        "layer_norm_epsilon": model.decoder.block.mlp_norm.epsilon,
        "decoder_start_token_id": model.start_id,
        "pad_token_id": 0,
        "is_encoder_decoder": True,
    }


def parts(settings: Settings) -> list[Part]:
    """Where each tensor lies in the arrays of `lmjax.models.t5`."""
    dim, heads = settings.integer("d_model", 512), settings.integer("num_heads", 8)
    vocab_size = settings.integer("vocab_size", 32128)
    found = [part("shared.weight", "embed/table", (vocab_size, dim))]
    if not _tied(settings):
        found.append(part("lm_head.weight", "unembed/table", (vocab_size, dim)))
    num_buckets = settings.integer("relative_attention_num_buckets", 32)
    sides = (
        ("encoder", settings.integer("num_layers", 6), "encoder_norm"),
        ("decoder", _decoder_layers(settings), "norm"),
    )
    for side, num_layers, norm in sides:
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(part(bias, f"{side}_bias/bias", (num_buckets, heads)))
        found.append(part(f"{side}.final_layer_norm.weight", f"{norm}/scale", (dim,)))
        for layer in range(num_layers):
            found += _layer(settings, side, layer)
    return found


def _layer(settings: Settings, side: str, layer: int) -> list[Part]:
    """The sublayers of one layer: attention, in a decoder cross-attention, and the MLP."""
    dim, hidden = settings.integer("d_model", 512), settings.integer("d_ff", 2048)
    theirs, ours, at = f"{side}.block.{layer}.layer", f"{side}/block", (layer,)
    names = ("attention", "cross", "mlp") if side == "decoder" else ("attention", "mlp")
    found = [
        part(f"{theirs}.{i}.layer_norm.weight", f"{ours}/{name}_norm/scale", (dim,), at=at)
        for i, name in enumerate(names)
    ]
    found += _attention(settings, f"{theirs}.0.SelfAttention", f"{ours}/attention", layer)
    if side == "decoder":
        found += _attention(
            settings, f"{theirs}.1.EncDecAttention", f"{ours}/cross_attention", layer
        )
    products = {"wi_0": "gate", "wi_1": "up"} if _gated(settings) else {"wi": "up"}
    for name, kernel in (products | {"wo": "down"}).items():
        found.append(
            part(
                f"{theirs}.{len(names) - 1}.DenseReluDense.{name}.weight",
                f"{ours}/mlp/{kernel}/kernel",
                (dim, hidden) if kernel == "down" else (hidden, dim),
                at=at,
                axes=(1, 0),
            )
        )
    return found


def _attention(settings: Settings, theirs: str, ours: str, layer: int) -> list[Part]:
    """The four products of an attention; ours joins q, k and v, or in a cross-attention k and v."""
    dim, heads = settings.integer("d_model", 512), settings.integer("num_heads", 8)
    K, at = settings.integer("d_kv", 64), (layer,)
    shape, cross = (heads * K, dim), ours.endswith("cross_attention")
    found = []
    for index, name in enumerate("qkv"):
        if cross and name == "q":
            found.append(
                part(
                    f"{theirs}.q.weight",
                    f"{ours}/q/kernel",
                    shape,
                    at=at,
                    split=(heads, K, dim),
                    axes=(2, 0, 1),
                )
            )
            continue
        start = index - 1 if cross else index
        found.append(
            part(
                f"{theirs}.{name}.weight",
                f"{ours}/{'kv' if cross else 'qkv'}/kernel",
                shape,
                at=at,
                split=(heads, 1, K, dim),
                axes=(3, 0, 1, 2),
                where=((0, dim), (0, heads), (start, start + 1), (0, K)),
            )
        )
    found.append(
        part(
            f"{theirs}.o.weight",
            f"{ours}/out/kernel",
            (dim, heads * K),
            at=at,
            split=(dim, heads, K),
            axes=(1, 2, 0),
        )
    )
    return found


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    tied="shared.weight",
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    # A table that early files hold, and no model reads.
    buffers=r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    recorded=recorded,
    fields=fields,
    parts=parts,
)
