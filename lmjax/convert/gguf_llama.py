"""Llama as llama.cpp's GGUF names it: metadata, tensors and tokenizer, both ways.

Source: `convert_hf_to_gguf.py` of llama.cpp, its class LlamaModel. The rows of each head's queries
and keys are laid out anew there, since llama.cpp turns neighbours where Hugging Face turns halves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.convert import llama
from lmjax.convert.gguf import GgufTensor, read_gguf
from lmjax.convert.parts import Part, Tensor
from lmjax.convert.settings import Settings
from lmjax.core import Tokenizer
from lmjax.data.sentencepiece import BPE, CONTROL, NORMAL, UNKNOWN, SentencePieceModel
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tiktoken import ENCODINGS, as_oniguruma
from lmjax.errors import UserError, did_you_mean
from lmjax.ops.rope import Rope, RopeScaling, frequencies

ROPE = "rope_freqs.weight"  # what llama.cpp divides the rotary frequencies by
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def parts(settings: Settings) -> list[Part]:
    """Where each tensor of a GGUF file lies in our arrays: Llama's table under other names."""
    found = []
    for p in llama.parts(llama.dense, settings):
        layer, name = _of_layer(p.tensor.removesuffix(".weight"))
        p = replace(p, tensor=f"{layer}{_NAMES[name]}.weight")
        if name in ("self_attn.q_proj", "self_attn.k_proj"):
            one, G, R, K, dim = p.split
            p = replace(p, split=(one, G, R, K // 2, 2, dim), axes=(0, 5, 1, 2, 4, 3))
        found.append(p)
    return found


def _of_layer(name: str) -> tuple[str, str]:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    return (f"blk.{found[1]}.", found[2]) if found else ("", name)


def open_gguf(path: Path) -> tuple[Settings, dict[str, Tensor], Mapping[str, Any]]:
    """Settings as config.json would have them, tensors, and the metadata.

    Raises UserError for another architecture, and for what ours cannot compute.
    """
    fields, tensors = read_gguf(path)
    given = Settings(str(path), fields)
    architecture = given.get("general.architecture", "")
    if architecture != "llama":
        raise UserError(
            f"{path}: general.architecture is {architecture!r}, and of GGUF files only 'llama' "
            "can be converted."
        )
    given.require("llama.expert_count", 0)
    heads, dim = (
        given.integer("llama.attention.head_count"),
        given.integer("llama.embedding_length"),
    )
    K = given.integer("llama.attention.key_length", dim // heads)
    given.require("llama.rope.dimension_count", K)
    given.require("llama.attention.value_length", K)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} lacks 'token_embd.weight'. Download it again.")
    theta = given.number("llama.rope.freq_base", 10_000.0)
    factors = tensors.pop(ROPE, None)
    settings = {
        "model_type": "llama",
        "num_hidden_layers": given.integer("llama.block_count"),
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": given.integer("llama.attention.head_count_kv", heads),
        "head_dim": K,
        "intermediate_size": given.integer("llama.feed_forward_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": given.integer("llama.context_length"),
        "rms_norm_eps": _shortest(given.number("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _scaling(given, theta, K, factors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
    }
    return Settings(str(path), settings), dict(tensors), fields


def _shortest(x: float) -> float:
    """The number whose float32 was written."""
    return float(str(np.float32(x)))


def _scaling(
    given: Settings, theta: float, head_dim: int, factors: GgufTensor | None
) -> dict[str, Any] | None:
    """`rope_scaling` as config.json has it."""
    kind = given.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": given.number("llama.rope.scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": given.number("llama.rope.scaling.factor"),
            "original_max_position_embeddings": given.integer(
                "llama.rope.scaling.original_context_length"
            ),
        }
    if kind != "none":
        given.require("llama.rope.scaling.type", "none", "linear", "yarn")
    if factors is None:
        return None
    wanted = factors.rows(0, factors.shape[0]).astype(np.float32)
    factor = max(1.0, round(float(wanted.max(initial=1.0)), 3))
    for length in (8192, *(2**n for n in range(4, 21))):  # that of Llama 3, and all that are likely
        made = RopeScaling(factor=factor, original_length=length)
        known = rope_factors(Rope(theta=theta, scaling=made), head_dim)
        if known.shape == wanted.shape and np.allclose(known, wanted):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": made.low_freq_factor,
                "high_freq_factor": made.high_freq_factor,
                "original_max_position_embeddings": length,
            }
    raise UserError(
        f"{given.source}: its {ROPE!r} are not those of a Llama 3 (low_freq_factor 1, "
        "high_freq_factor 4): convert its folder of safetensors."
    )


def rope_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """What the frequencies are divided by, float32 [K / 2]."""
    plain = frequencies(Rope(theta=rope.theta), head_dim)
    return (plain / frequencies(rope, head_dim)).astype(np.float32)


def metadata(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a config.json's fields, without the tokenizer's.

    Raises UserError for a rotation that GGUF does not know.
    """
    found: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": fields["num_hidden_layers"],
        "llama.context_length": fields["max_position_embeddings"],
        "llama.embedding_length": fields["hidden_size"],
        "llama.feed_forward_length": fields["intermediate_size"],
        "llama.attention.head_count": fields["num_attention_heads"],
        "llama.attention.head_count_kv": fields["num_key_value_heads"],
        "llama.attention.key_length": fields["head_dim"],
        "llama.attention.value_length": fields["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": float(fields["rms_norm_eps"]),
        "llama.rope.dimension_count": fields["head_dim"],
        "llama.rope.freq_base": float(fields["rope_theta"]),
        "llama.vocab_size": fields["vocab_size"],
    }
    scaling = fields["rope_scaling"]
    kind = None if scaling is None else scaling["rope_type"]
    if kind == "linear":
        found["llama.rope.scaling.type"] = "linear"
        found["llama.rope.scaling.factor"] = float(scaling["factor"])
    elif kind not in (None, "llama3"):
        raise UserError(
            f"the model's rope_scaling is {kind!r}, of which a GGUF file holds no more than its "
            "factor: export a folder of safetensors."
        )
    return found


# The cut into words by `tokenizer.ggml.pre`: steps of a tokenizer.json.
def _pre_tokenizer(name: str) -> list[dict[str, Any]]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words = [{**level, "use_regex": True}]
    if name in ("gpt-2", "default"):
        return words
    if name == "smollm":
        return [{"type": "Digits", "individual_digits": True}, *words]
    if name == "llama-bpe":
        pattern = {"Regex": as_oniguruma(ENCODINGS["llama3"].pattern)}
        cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        return [cut, {**level, "use_regex": False}]
    raise UserError(
        f"tokenizer.ggml.pre is {name!r}, a cut into words that lmjax does not know: give the "
        "model's tokenizer by --tokenizer=DIR." + did_you_mean(name, PRE_TOKENIZERS)
    )


PRE_TOKENIZERS = ("gpt-2", "default", "smollm", "llama-bpe")


def read_vocabulary(source: str, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file; raises UserError for a kind that we lack, with the way round."""
    given = Settings(source, fields)
    kind = given.get("tokenizer.ggml.model", "none")
    try:
        tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
        types = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
        if kind == "gpt2":
            pre = given.get("tokenizer.ggml.pre", "default")
            text = _bpe_json(tokens, types, fields["tokenizer.ggml.merges"], pre)
        elif kind == "llama":
            scores = fields["tokenizer.ggml.scores"]
            text = SentencePieceModel(
                pieces=tuple(zip(tokens, scores, types, strict=True)),
                kind=BPE,
                character_map=b"",
                leading_space=given.boolean("tokenizer.ggml.add_space_prefix", True),
                one_space=False,
                byte_fallback=True,
                special_tokens=(),
            ).to_json()
        else:
            raise UserError(
                f"{source}: its tokenizer is of the kind {kind!r}, and 'gpt2' and 'llama' can be "
                "read. Give the model's tokenizer by --tokenizer=DIR."
            )
        roles = {"eos_token": "eos", "bos_token": "bos", "pad_token": "padding"}
        named = {
            role: tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
            for role, name in roles.items()
            if f"tokenizer.ggml.{name}_token_id" in fields
        }
        template = given.get("tokenizer.chat_template")
        made = SubwordTokenizer(
            tokenizer_json=text,
            vocab_size=len(tokens),
            end_id=given.integer("tokenizer.ggml.eos_token_id"),
            special_tokens=tuple(sorted(named.items())),
            chat_templates=(("default", template),) if isinstance(template, str) else (),
        )
    except (KeyError, IndexError, TypeError, StopIteration) as error:
        raise UserError(
            f"{source}: its tokenizer is damaged or not all there ({error!r}). Give the model's "
            "by --tokenizer=DIR."
        ) from error
    made.check()
    return made


def _bpe_json(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> str:
    special = [i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    flags["special"] = True
    steps = _pre_tokenizer(pre)
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True, **flags} for i in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    return json.dumps(tree, ensure_ascii=False)


def vocabulary_fields(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer whose cut into words llama.cpp has a name for.

    Empty for another one: such a file holds the model alone.
    """
    text = getattr(tokenizer, "tokenizer_json", None)
    tree = json.loads(text) if text else {}
    steps = tree.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    pre = next((name for name in PRE_TOKENIZERS if _same(steps, _pre_tokenizer(name))), None)
    if tree.get("model", {}).get("type") != "BPE" or pre is None or tree.get("normalizer"):
        return {}
    control = {token["id"]: token["content"] for token in tree["added_tokens"]}
    named = {index: token for token, index in tree["model"]["vocab"].items()} | control
    if named and max(named) >= vocab_size:
        return {}
    unused = {i: f"[PAD{i}]" for i in range(vocab_size) if i not in named}
    merges = [m if isinstance(m, str) else " ".join(m) for m in tree["model"]["merges"]]
    special = {t["id"] for t in tree["added_tokens"] if t["special"]} | {tokenizer.end_id}
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [(named | unused)[i] for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [
            5 if i in unused and i != tokenizer.end_id else 3 if i in special else NORMAL
            for i in range(vocab_size)
        ],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokenizer.end_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    ids = {token: index for index, token in named.items()}
    if (bos := dict(tokenizer.special_tokens).get("bos_token")) in ids:
        found["tokenizer.ggml.bos_token_id"] = ids[bos]
    if template := dict(tokenizer.chat_templates).get("default"):
        found["tokenizer.chat_template"] = template
    return found


def _same(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    def plain(step: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in step.items() if k != "trim_offsets"}

    return [plain(s) for s in one] == [plain(s) for s in other]
