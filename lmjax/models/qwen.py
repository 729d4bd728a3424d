"""Qwen 2, 2.5 and 3.

Sources: Qwen Team, "Qwen2 Technical Report", arXiv:2407.10671, table 1; "Qwen2.5 Technical
Report", arXiv:2412.15115, table 1; "Qwen3 Technical Report", arXiv:2505.09388, table 1; hidden
units and vocabularies as in the published configurations.

It is Llama (`lmjax.models.llama`, whose initialisation is taken; norms of queries and keys start at
1, biases at 0) with biases on queries, keys and values in Qwen 2, and in Qwen 3 norms of each
head's queries and keys in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmjax.errors import UserError, did_you_mean
from lmjax.layers.attention import residual_std
from lmjax.layers.mlp import SwiGlu
from lmjax.layers.transformer import Remat
from lmjax.models.decoder import DecoderLM, check_sizes
from lmjax.models.llama import INIT_STD, Departures, Dtype, rotary_decoder
from lmjax.ops.rope import Rope, Scaling


def qwen(
    *,
    num_layers: int,
    dim: int,
    num_heads: int,
    hidden: int,
    vocab_size: int,
    max_length: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
    window_layers: tuple[bool, ...] | None = None,
    rope_theta: float = 1_000_000.0,
    rope_scaling: Scaling | None = None,
    tied: bool = False,
    epsilon: float = 1e-6,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """A Qwen of any size.

    Args:
      qkv_bias: queries, keys and values have biases, as in Qwen 2.
      qk_norm: each head's queries and keys are normalised, as in Qwen 3.
      window: in layers that have one a token sees so many tokens, itself the last.
      window_layers: for each layer whether it has the window; all have it where not given.

    For the others see `llama`.
    """
    check_sizes(num_layers=num_layers, dim=dim, hidden=hidden)
    out_std = residual_std(INIT_STD, num_layers)
    mlp = SwiGlu(dim=dim, hidden=hidden, init_std=INIT_STD, out_std=out_std, dtype=dtype)
    return rotary_decoder(
        [(num_layers, mlp)],
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_length=max_length,
        rope=Rope(theta=rope_theta, scaling=rope_scaling),
        tied=tied,
        epsilon=epsilon,
        vocab_multiple=vocab_multiple,
        dtype=dtype,
        remat=remat,
        unroll=unroll,
        departures=Departures(
            qkv_bias=qkv_bias, qk_norm=qk_norm, window=window, window_layers=window_layers
        ),
    )


@dataclass(frozen=True)
class Size:
    """A published model, by the names of `qwen`'s arguments."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    vocab_size: int = 151936
    tied: bool = False


QWEN2_SIZES = {
    "0.5b": Size(24, 896, 14, 2, 64, 4864, tied=True),
    "1.5b": Size(28, 1536, 12, 2, 128, 8960, tied=True),
    "3b": Size(36, 2048, 16, 2, 128, 11008, tied=True),
    "7b": Size(28, 3584, 28, 4, 128, 18944, vocab_size=152064),
    "14b": Size(48, 5120, 40, 8, 128, 13824, vocab_size=152064),
    "32b": Size(64, 5120, 40, 8, 128, 27648, vocab_size=152064),
    "72b": Size(80, 8192, 64, 8, 128, 29568, vocab_size=152064),
}
QWEN3_SIZES = {
    "0.6b": Size(28, 1024, 16, 8, 128, 3072, tied=True),
    "1.7b": Size(28, 2048, 16, 8, 128, 6144, tied=True),
    "4b": Size(36, 2560, 32, 8, 128, 9728, tied=True),
    "8b": Size(36, 4096, 32, 8, 128, 12288),
    "14b": Size(40, 5120, 40, 8, 128, 17408),
    "32b": Size(64, 5120, 64, 8, 128, 25600),
}


def qwen2(
    *,
    size: str = "7b",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    vocab_size: int | None = None,
    max_length: int = 32768,
    rope_theta: float = 1_000_000.0,
    rope_scaling: Scaling | None = None,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """Qwen 2 0.5B, 1.5B, 7B and 72B, and Qwen 2.5, which has 3B, 14B and 32B besides.

    In their order of size 494,032,768, 1,543,714,304, 3,085,938,688, 7,615,616,512,
    14,770,033,664, 32,763,876,352 and 72,706,203,648 parameters. Numbers that are given stand in
    the place of the preset's.
    """
    return _preset(QWEN2_SIZES, qkv_bias=True, **locals())


def qwen3(
    *,
    size: str = "8b",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    vocab_size: int | None = None,
    max_length: int = 32768,
    rope_theta: float = 1_000_000.0,
    rope_scaling: Scaling | None = None,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """Qwen 3 0.6B, 1.7B, 4B, 8B, 14B and 32B.

    In their order 596,049,920, 1,720,574,976, 4,022,468,096, 8,190,735,360, 14,768,307,200 and
    32,762,123,264 parameters. Numbers that are given stand in the place of the preset's.
    """
    return _preset(QWEN3_SIZES, qk_norm=True, **locals())


def _preset(sizes: dict[str, Size], *, size: str, **fields: Any) -> DecoderLM:
    if size not in sizes:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, sizes))
    given = {name: value for name, value in fields.items() if value is not None}
    preset = vars(sizes[size]) | given
    if "dim" in given or "num_heads" in given:
        preset["head_dim"] = None
    return qwen(**preset)
