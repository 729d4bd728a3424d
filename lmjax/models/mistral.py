"""Mistral.

Sources: Jiang et al., "Mistral 7B", arXiv:2310.06825, table 1; for the later ones the published
configurations of Mistral 7B v0.2 and v0.3, Mistral NeMo 12B and Mistral Small 3 24B.

It is Llama (`lmjax.models.llama`, whose initialisation is taken) with a window on the attention of
every layer, which 7B v0.2 and what came after gave up again.

Departures:
  - The cache holds all tokens, not the last `window` (the paper's rolling buffer, section 2).
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


def mistral(
    *,
    num_layers: int,
    dim: int,
    num_heads: int,
    hidden: int,
    vocab_size: int,
    max_length: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    rope_theta: float = 10_000.0,
    rope_scaling: Scaling | None = None,
    tied: bool = False,
    epsilon: float = 1e-5,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """A Mistral of any size.

    Args:
      window: a token sees so many tokens of its context, itself the last; all where not given.

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
        departures=Departures(window=window),
    )


@dataclass(frozen=True, kw_only=True)
class Size:
    """A published model, by the names of `mistral`'s arguments."""

    num_layers: int
    dim: int
    hidden: int
    vocab_size: int
    rope_theta: float
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    max_length: int = 32768
    window: int | None = None


_7B = {"num_layers": 32, "dim": 4096, "hidden": 14336}
SIZES = {
    "7b-v0.1": Size(**_7B, vocab_size=32000, rope_theta=1e4, window=4096),
    "7b-v0.2": Size(**_7B, vocab_size=32000, rope_theta=1e6),
    "7b-v0.3": Size(**_7B, vocab_size=32768, rope_theta=1e6),
    "nemo-12b": Size(
        num_layers=40,
        dim=5120,
        hidden=14336,
        vocab_size=131072,
        rope_theta=1e6,
        max_length=131072,
    ),
    "small-24b": Size(num_layers=40, dim=5120, hidden=32768, vocab_size=131072, rope_theta=1e8),
}


def mistral_preset(
    *,
    size: str = "7b-v0.1",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
    window: int | None = None,
    rope_theta: float | None = None,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """Mistral 7B v0.1 and v0.2 (7,241,732,096 parameters), v0.3 (7,248,023,552), NeMo and Small 3.

    NeMo 12B has 12,247,782,400, Small 3 24B 23,572,403,200. Numbers that are given stand in the
    place of the preset's.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    if given.pop("size") not in SIZES:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, SIZES))
    preset: dict[str, Any] = vars(SIZES[size]) | given
    if dim is not None or num_heads is not None:
        preset["head_dim"] = None
    return mistral(**preset)
