"""Llama 2 and Llama 3.

Sources: Touvron et al., "Llama 2", arXiv:2307.09288, table 1; "The Llama 3 Herd of Models",
arXiv:2407.21783, table 3; for 3.2, the published configurations of its 1B and 3B models.

Departures:
  - The reports give no initialisation; here projections into the residual stream start smaller, as
    in GPT-2.

| parameter | initialisation |
|---|---|
| token embedding, output layer, kernels | normal, std 0.02 |
| attention out, mlp down | normal, std 0.02 / sqrt(2 num_layers) |
| norm scale | 1 |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from flax import linen as nn

from lmjax.errors import UserError, did_you_mean
from lmjax.layers.attention import Attention, residual_std
from lmjax.layers.embed import Embed, Unembed
from lmjax.layers.mlp import SwiGlu
from lmjax.layers.norm import RMSNorm
from lmjax.layers.transformer import Block, Remat, Stack
from lmjax.models.decoder import DecoderLM, Stacks, check_heads, check_sizes
from lmjax.ops.rope import Rope, RopeScaling, Scaling, frequencies

Dtype = Literal["float32", "bfloat16"]
INIT_STD = 0.02


@dataclass(frozen=True)
class Size:
    """A published model: what differs between those of one generation."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    rope_factor: float | None = None
    tied: bool = False


LLAMA2_SIZES = {
    "7b": Size(32, 4096, 32, 32, 128, 11008),
    "13b": Size(40, 5120, 40, 40, 128, 13824),
}
LLAMA3_SIZES = {
    "nano": Size(4, 256, 8, 4, 32, 768),  # not Meta's: for a CPU and for tests
    "1b": Size(16, 2048, 32, 8, 64, 8192, rope_factor=32.0, tied=True),
    "3b": Size(28, 3072, 24, 8, 128, 8192, rope_factor=32.0, tied=True),
    "8b": Size(32, 4096, 32, 8, 128, 14336, rope_factor=8.0),
    "70b": Size(80, 8192, 64, 8, 128, 28672, rope_factor=8.0),
    "405b": Size(126, 16384, 128, 8, 128, 53248, rope_factor=8.0),
}


@dataclass(frozen=True, kw_only=True)
class Departures:
    """What the blocks of another family have that Llama's have not.

    Args:
      qkv_bias: queries, keys and values have biases.
      qk_norm: RMSNorm of each head's queries and keys, before they are rotated.
      window: a token sees so many, itself the last.
      window_layers: for each layer whether it has the window; all have it where not given.
      window_rope: the rotation of those layers, if it is another.
      query_scale: factor of the attention scores; 1 / sqrt(head_dim) where not given.
      attention_softcap: bound of the scores.
      logit_softcap: bound of the logits.
      post_norms: what attention and MLP add to the residual stream is normalised too.
      norm_offset: what all norms' scales have beside the parameter.
      embed_scale: factor of the token vectors.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    window_rope: Rope | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0

    def check(self, num_layers: int) -> None:
        """Raises UserError for what cannot work in a model of so many layers."""
        if self.window is not None:
            check_sizes(window=self.window)
        layers = self.window_layers
        if layers is not None and len(layers) != num_layers:
            raise UserError(
                f"window_layers speaks of {len(layers)} layers, and num_layers is {num_layers}: "
                "give one truth value for each layer."
            )
        if layers is not None and any(layers) and self.window is None:
            raise UserError("window_layers gives layers a window, and window is None: set it.")
        for name in ("query_scale", "attention_softcap", "logit_softcap", "embed_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}: must be positive and finite.")


LLAMA = Departures()


def llama(
    *,
    num_layers: int,
    dim: int,
    num_heads: int,
    vocab_size: int,
    max_length: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden: int | None = None,
    rope_theta: float = 10_000.0,
    rope_scaling: Scaling | None = None,
    tied: bool = False,
    epsilon: float = 1e-5,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """A Llama of any size.

    Args:
      num_kv_heads: heads of keys and values; num_heads where not given.
      head_dim: dim / num_heads where not given.
      hidden: hidden units of the MLP; where not given 8/3 dim, rounded up to a multiple of 256.
      rope_theta: base of the rotary frequencies.
      rope_scaling: a change of them for longer contexts, see `ops.rope`.
      tied: the output layer is the token embedding.
      epsilon: of the norms.
      vocab_multiple: the tables of the vocabulary are padded to a multiple of it.
      dtype: of the products' operands; parameters are float32.
      remat: see `Stack`.
      unroll: see `Stack`.
    """
    hidden = -(-8 * dim // (3 * 256)) * 256 if hidden is None else hidden
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
    )


def rotary_decoder(
    layers: Sequence[tuple[int, nn.Module]],
    *,
    dim: int,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
    vocab_size: int,
    max_length: int,
    rope: Rope,
    tied: bool,
    epsilon: float,
    vocab_multiple: int,
    dtype: Dtype,
    remat: Remat,
    unroll: int,
    departures: Departures = LLAMA,
) -> DecoderLM:
    """RMSNorm, rotary grouped-query attention and the given MLPs: (how many layers, their MLP).

    For the other arguments see `llama`; raises UserError for sizes that cannot work.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check_sizes(
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        vocab_size=vocab_size,
        max_length=max_length,
        vocab_multiple=vocab_multiple,
        unroll=unroll,
        head_dim=1 if head_dim is None else head_dim,
    )
    if not 0 < epsilon < math.inf:
        raise UserError(f"epsilon is {epsilon}: must be positive and finite.")
    if num_heads % kv_heads:
        fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise UserError(
            f"num_kv_heads {kv_heads} does not divide num_heads {num_heads}: choose one of {fits}."
        )
    if head_dim is None:
        check_heads(dim, num_heads)
        head_dim = dim // num_heads
    frequencies(rope, head_dim)  # refuses an odd head_dim
    num_layers = sum(count for count, _ in layers)
    departures.check(num_layers)
    out_std = residual_std(INIT_STD, num_layers)
    norm = partial(RMSNorm, epsilon, dtype, departures.norm_offset)
    stacks: list[Stack] = []
    for count, mlp in layers:
        first = sum(stack.num_layers for stack in stacks)
        windows = departures.window_layers
        block = Block(
            attention_norm=norm(),
            attention=Attention(
                dim=dim,
                num_heads=num_heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                init_std=INIT_STD,
                out_std=out_std,
                use_bias=departures.qkv_bias,
                out_bias=False,
                rope=rope,
                first_layer=first,
                dtype=dtype,
                q_norm=norm() if departures.qk_norm else None,
                k_norm=norm() if departures.qk_norm else None,
                window=departures.window,
                window_layers=None if windows is None else windows[first : first + count],
                window_rope=departures.window_rope,
                softcap=departures.attention_softcap,
                query_scale=departures.query_scale,
            ),
            mlp_norm=norm(),
            mlp=mlp,
            attention_post_norm=norm() if departures.post_norms else None,
            mlp_post_norm=norm() if departures.post_norms else None,
        )
        stacks.append(Stack(block=block, num_layers=count, remat=remat, unroll=unroll))
    table = (vocab_size, dim, vocab_multiple, INIT_STD, dtype)
    cap = departures.logit_softcap
    return DecoderLM(
        embed=Embed(*table, departures.embed_scale, cap),
        positions=None,
        blocks=stacks[0] if len(stacks) == 1 else Stacks(tuple(stacks)),
        norm=norm(),
        max_length=max_length,
        unembed=None if tied else Unembed(*table, cap),
    )


def llama2(
    *,
    size: str = "7b",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    vocab_size: int = 32000,
    max_length: int = 4096,
    rope_theta: float = 10_000.0,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """Llama 2 7B (6,738,415,616 parameters) and 13B (13,015,864,320)."""
    return _preset(LLAMA2_SIZES, **locals())


def llama3(
    *,
    size: str = "8b",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    vocab_size: int = 128256,
    max_length: int = 131072,
    rope_theta: float = 500_000.0,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """Llama 3.2 1B and 3B (1,235,814,400 and 3,212,749,824 parameters, tied), 3.1 8B to 405B.

    8B has 8,030,261,248, 70B 70,553,706,496 and 405B 405,853,388,800.
    """
    return _preset(LLAMA3_SIZES, **locals())


def _preset(
    sizes: dict[str, Size],
    *,
    size: str,
    num_layers: int | None,
    dim: int | None,
    num_heads: int | None,
    num_kv_heads: int | None,
    hidden: int | None,
    **fields: Any,
) -> DecoderLM:
    """The preset of a size; numbers that are given stand in the place of the preset's."""
    if size not in sizes:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, sizes))
    preset = sizes[size]
    factor = preset.rope_factor
    return llama(
        num_layers=preset.num_layers if num_layers is None else num_layers,
        dim=preset.dim if dim is None else dim,
        num_heads=preset.num_heads if num_heads is None else num_heads,
        num_kv_heads=preset.num_kv_heads if num_kv_heads is None else num_kv_heads,
        head_dim=preset.head_dim if dim is None and num_heads is None else None,
        hidden=preset.hidden if hidden is None else hidden,
        rope_scaling=None if factor is None else RopeScaling(factor=factor),
        tied=preset.tied,
        **fields,
    )
