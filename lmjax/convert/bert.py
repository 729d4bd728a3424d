"""BERT in Hugging Face's names.

Source: `transformers.models.bert`. Its products keep weights as [out, in], ours as [in, out];
queries, keys and values are three products, which ours join for each head. Names begin with "bert."
where the model has a head that predicts tokens, and only there. Which heads there are the tensors
say, not config.json: files of Google's are called BertForMaskedLM and hold those of next sentences.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lmjax.config import call
from lmjax.convert.family import Family, Fields
from lmjax.convert.parts import Part, Tensor, part, same
from lmjax.convert.settings import Settings
from lmjax.errors import UserError
from lmjax.models.bert import BERT_SIZES, Bert, bert
from lmjax.models.decoder import check_heads, check_sizes

log = logging.getLogger("lmjax")

BLOCK = "blocks/block"
ENCODER, PREDICTING = "BertModel", "BertForMaskedLM"
ACTIVATIONS = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# Heads that ours have no place for: what is made of them is trained anew.
_OTHER_HEADS = re.compile(r"(classifier|qa_outputs|cls\.seq_relationship)\.(weight|bias)")
_DECODER = "cls.predictions.decoder"
_OLD = {"gamma": "weight", "beta": "bias"}  # of norms in files made from TensorFlow's


def arranged(
    settings: Settings, tensors: Mapping[str, Tensor]
) -> tuple[Settings, dict[str, Tensor]]:
    """The settings with what the names say of heads, and the tensors by the names of `parts`."""
    found, left_out = {}, []
    for name, tensor in tensors.items():
        plain = name.removeprefix("bert.")
        if _OTHER_HEADS.fullmatch(plain):
            left_out.append(plain)
            continue
        if plain.endswith((".LayerNorm.gamma", ".LayerNorm.beta")):
            stem, _, kind = plain.rpartition(".")
            plain = f"{stem}.{_OLD[kind]}"
        if plain in found:
            raise UserError(
                f"{settings.source}: its tensors hold {plain!r} twice, as {name!r} too."
            )
        found[plain] = tensor
    if left_out:
        log.warning("%s: left out, for lmjax has no such head", ", ".join(sorted(left_out)))
    for theirs, tied in (
        ("weight", "embeddings.word_embeddings.weight"),
        ("bias", "cls.predictions.bias"),
    ):
        if (head := found.pop(f"{_DECODER}.{theirs}", None)) is None:
            continue
        if tied not in found:
            found[tied] = head
        elif not same(head, found[tied]):
            raise UserError(
                f"{settings.source}: {_DECODER}.{theirs} is not {tied}, and BERT ties the two: "
                f"leave {_DECODER}.{theirs} out."
            )
    named = settings.get("architectures", [ENCODER])
    predicting = any(name.startswith("cls.predictions.") for name in found)
    if predicting or PREDICTING in named or "BertForPreTraining" in named:
        found = {n if n.startswith("cls.") else f"bert.{n}": x for n, x in found.items()}
        named = [PREDICTING]
    else:
        named = [ENCODER]
    pooler = any(name.endswith("pooler.dense.weight") for name in found)
    fields = {**settings.fields, "architectures": named, "add_pooling_layer": pooler}
    return Settings(settings.source, fields), found


def heads(settings: Settings) -> tuple[bool, bool]:
    """(whether there is a head that predicts tokens, whether a pooler)."""
    predicting = PREDICTING in settings.get("architectures", [ENCODER])
    return predicting, settings.boolean("add_pooling_layer", not predicting)


def recorded(settings: Settings, dtype: Any) -> ConfigDict:
    """The model of a config.json."""
    settings.require("hidden_act", *ACTIVATIONS)
    settings.require("position_embedding_type", "absolute")
    settings.require("is_decoder", False)
    settings.require("add_cross_attention", False)
    settings.require("tie_word_embeddings", True)
    settings.require("quantization_config", None)
    predicting, pooler = heads(settings)
    shape = (
        settings.integer("num_hidden_layers", 12),
        settings.integer("hidden_size", 768),
        settings.integer("num_attention_heads", 12),
    )
    return call(
        bert,
        size=next((name for name, known in BERT_SIZES.items() if known == shape), "base"),
        **dict(zip(("num_layers", "dim", "num_heads"), shape, strict=True)),
        hidden=settings.integer("intermediate_size", 3072),
        vocab_size=settings.integer("vocab_size", 30522),
        max_length=settings.integer("max_position_embeddings", 512),
        num_token_types=settings.integer("type_vocab_size", 2),
        pooler=pooler,
        token_head=predicting,
        activation=ACTIVATIONS[settings.get("hidden_act", "gelu")],
        dropout=settings.number("hidden_dropout_prob", 0.1),
        attention_dropout=settings.number("attention_probs_dropout_prob", 0.1),
        epsilon=settings.number("layer_norm_eps", 1e-12),
        dtype=dtype,
    )


def fields(model: Bert) -> Fields:
    """config.json of a model."""
    block = model.blocks.block
    predicting, pooler = model.head is not None, model.pooler is not None
    found = {
        "architectures": [PREDICTING if predicting else ENCODER],
        "num_hidden_layers": model.blocks.num_layers,
        "hidden_size": model.embed.dim,
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": block.mlp.hidden,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": model.token_types.num_types,
        "hidden_act": "gelu" if block.mlp.form == "erf" else "gelu_new",
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": block.attention.dropout,
        "layer_norm_eps": model.embed_norm.epsilon,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "tie_word_embeddings": True,
    }
    if pooler == predicting:  # transformers' own classes have one head of the two
        found["add_pooling_layer"] = pooler
    return found


def parts(settings: Settings) -> list[Part]:
    """Where each tensor lies in the arrays of `lmjax.models.bert`."""
    dim, vocab_size = settings.integer("hidden_size", 768), settings.integer("vocab_size", 30522)
    predicting, pooler = heads(settings)
    prefix = "bert." if predicting else ""
    found = []
    for theirs, ours, rows in (
        ("word", "embed", vocab_size),
        ("position", "positions", settings.integer("max_position_embeddings", 512)),
        ("token_type", "token_types", settings.integer("type_vocab_size", 2)),
    ):
        name = f"{prefix}embeddings.{theirs}_embeddings.weight"
        found.append(part(name, f"{ours}/table", (rows, dim)))
    found += _norm(f"{prefix}embeddings", "embed_norm", dim, ())
    for layer in range(settings.integer("num_hidden_layers", 12)):
        found += _layer(f"{prefix}encoder.layer.{layer}", settings, (layer,))
    if pooler:
        found += _product(f"{prefix}pooler", "pooler", dim, dim, ())
    if predicting:
        head = "cls.predictions"
        found += _product(f"{head}.transform", "head/dense", dim, dim, ())
        found += _norm(f"{head}.transform", "head/norm", dim, ())
        found.append(part(f"{head}.bias", "head/bias", (vocab_size,)))
    return found


def _layer(prefix: str, settings: Settings, at: tuple[int, ...]) -> list[Part]:
    dim, H = settings.integer("hidden_size", 768), settings.integer("num_attention_heads", 12)
    check_sizes(hidden_size=dim, num_attention_heads=H)
    check_heads(dim, H)
    hidden, K = settings.integer("intermediate_size", 3072), dim // H
    found = []
    for i, name in enumerate(("query", "key", "value")):
        theirs, ours = f"{prefix}.attention.self.{name}", f"{BLOCK}/attention/qkv"
        found.append(
            part(
                f"{theirs}.weight",
                f"{ours}/kernel",
                (dim, dim),
                at=at,
                split=(H, 1, K, dim),
                axes=(3, 0, 1, 2),
                where=((0, dim), (0, H), (i, i + 1), (0, K)),
            )
        )
        found.append(
            part(
                f"{theirs}.bias",
                f"{ours}/bias",
                (dim,),
                at=at,
                split=(H, 1, K),
                where=((0, H), (i, i + 1), (0, K)),
            )
        )
    out = f"{prefix}.attention.output"
    found.append(
        part(
            f"{out}.dense.weight",
            f"{BLOCK}/attention/out/kernel",
            (dim, dim),
            at=at,
            split=(dim, H, K),
            axes=(1, 2, 0),
        )
    )
    found.append(part(f"{out}.dense.bias", f"{BLOCK}/attention/out/bias", (dim,), at=at))
    found += _norm(out, f"{BLOCK}/attention_norm", dim, at)
    found += _product(f"{prefix}.intermediate", f"{BLOCK}/mlp/up", dim, hidden, at)
    found += _product(f"{prefix}.output", f"{BLOCK}/mlp/down", hidden, dim, at)
    return found + _norm(f"{prefix}.output", f"{BLOCK}/mlp_norm", dim, at)


def _product(prefix: str, path: str, into: int, out: int, at: tuple[int, ...]) -> list[Part]:
    return [
        part(f"{prefix}.dense.weight", f"{path}/kernel", (out, into), at=at, axes=(1, 0)),
        part(f"{prefix}.dense.bias", f"{path}/bias", (out,), at=at),
    ]


def _norm(prefix: str, path: str, dim: int, at: tuple[int, ...]) -> list[Part]:
    return [
        part(f"{prefix}.LayerNorm.{theirs}", f"{path}/{ours}", (dim,), at=at)
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ]


BERT = Family(
    model_type="bert",
    architecture=ENCODER,
    others=(
        PREDICTING,
        "BertForPreTraining",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMultipleChoice",
    ),
    prefix="",
    tied="embeddings.word_embeddings.weight",
    buffers=r"^(bert\.)?embeddings\.(position_ids|token_type_ids)$",
    task=None,
    recorded=recorded,
    fields=fields,
    parts=parts,
    arranged=arranged,
)
