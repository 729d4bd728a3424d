"""T5 and T5 v1.1, whose weights FLAN-T5 has fine-tuned.

Sources: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", arXiv:1910.10683, section 2.1 and 3.1.1; for v1.1 (GeGLU, an output layer of its own)
the released configurations, and Shazeer, arXiv:2002.05202. FLAN-T5: Chung et al., arXiv:2210.11416.

Scores are not divided by sqrt(head_dim); nothing has a bias but the scores, by how far a key lies
from its query, one table for all layers of a stack.

Departures:
  - No dropout on the hidden units of the MLPs.
  - An output layer of its own starts with std dim**-0.5, as in the released code of T5X, so that
    logits start near 1; `transformers` has 1.

| parameter | initialisation |
|---|---|
| token embedding | normal, std 1 |
| queries | normal, std (dim head_dim)**-0.5 |
| keys, values, mlp gate and up, bias of scores, output layer | normal, std dim**-0.5 |
| attention out | normal, std (num_heads head_dim)**-0.5 |
| mlp down | normal, std hidden**-0.5 |
| norm scale | 1 |
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from lmjax.errors import UserError, did_you_mean
from lmjax.layers.attention import Attention
from lmjax.layers.cross_attention import CrossAttention
from lmjax.layers.embed import Embed, Unembed
from lmjax.layers.mlp import GeGlu, ReluMlp
from lmjax.layers.norm import RMSNorm
from lmjax.layers.relative import RelativeBias
from lmjax.layers.transformer import Block, Remat, Stack
from lmjax.models.decoder import check_sizes
from lmjax.models.encoder_decoder import EncoderDecoderLM

Dtype = Literal["float32", "bfloat16"]

# name: (num_layers of each stack, dim, num_heads, head_dim, hidden)
T5_V1_1_SIZES = {
    "nano": (2, 128, 4, 32, 256),  # not Google's: for a CPU and for tests
    "small": (8, 512, 6, 64, 1024),
    "base": (12, 768, 12, 64, 2048),
    "large": (24, 1024, 16, 64, 2816),
    "xl": (24, 2048, 32, 64, 5120),
    "xxl": (24, 4096, 64, 64, 10240),
}
T5_V1_0_SIZES = {
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16384),
    "11b": (24, 1024, 128, 128, 65536),
}


def t5(
    *,
    num_layers: int,
    dim: int,
    num_heads: int,
    head_dim: int,
    hidden: int,
    vocab_size: int,
    max_length: int,
    num_decoder_layers: int | None = None,
    gated: bool = True,
    tied: bool = False,
    num_buckets: int = 32,
    max_distance: int = 128,
    start_id: int = 0,
    epsilon: float = 1e-6,
    dropout: float = 0.0,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> EncoderDecoderLM:
    """A T5 of any size: v1.1 as it stands, the original with `gated=False, tied=True`.

    Args:
      num_layers: of the encoder, and of the decoder where `num_decoder_layers` is not given.
      hidden: hidden units of the MLPs.
      max_length: the longest source and target. Its positions are distances, so that any is
        possible; the released models were trained with 512.
      gated: GeGLU with the tanh form of GELU; else ReLU.
      tied: the output layer is the token embedding, its input scaled by dim**-0.5.
      num_buckets: of distances.
      max_distance: from there on all distances share one bucket.
      start_id: the token before the target's first.
      epsilon: of the norms.
      dropout: rate on embeddings, attention probabilities, all branches of each block and what each
        stack returns.
      vocab_multiple: the tables of the vocabulary are padded to a multiple of it.
      dtype: of the products' operands; parameters are float32.
      remat: see `Stack`.
      unroll: see `Stack`.
    """
    decoder_layers = num_layers if num_decoder_layers is None else num_decoder_layers
    check_sizes(
        num_layers=num_layers,
        num_decoder_layers=decoder_layers,
        dim=dim,
        num_heads=num_heads,
        head_dim=head_dim,
        hidden=hidden,
        vocab_size=vocab_size,
        max_length=max_length,
        vocab_multiple=vocab_multiple,
        unroll=unroll,
    )
    _check(num_buckets, max_distance, start_id, vocab_size)
    if not 0 < epsilon < math.inf:
        raise UserError(f"epsilon is {epsilon}: must be positive and finite.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: must be at least 0 and below 1.")
    std = dim**-0.5
    norm = partial(RMSNorm, epsilon, dtype)
    heads: dict[str, Any] = {
        "dim": dim,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "dropout": dropout,
        "init_std": std,
        "out_std": (num_heads * head_dim) ** -0.5,
        "query_std": (dim * head_dim) ** -0.5,
        "use_bias": False,
        "query_scale": 1.0,
        "dtype": dtype,
    }
    mlp = partial(
        GeGlu if gated else ReluMlp,
        dim=dim,
        hidden=hidden,
        init_std=std,
        out_std=hidden**-0.5,
        dtype=dtype,
    )

    def stack(layers: int, *, decodes: bool) -> Stack:
        block = Block(
            attention_norm=norm(),
            attention=Attention(**heads, causal=decodes),
            mlp_norm=norm(),
            mlp=mlp(),
            dropout=dropout,
            cross_norm=norm() if decodes else None,
            cross_attention=CrossAttention(**heads) if decodes else None,
        )
        return Stack(block=block, num_layers=layers, remat=remat, unroll=unroll)

    bias = partial(
        RelativeBias,
        num_heads,
        num_buckets=num_buckets,
        max_distance=max_distance,
        init_std=std,
    )
    return EncoderDecoderLM(
        embed=Embed(vocab_size, dim, vocab_multiple, 1.0, dtype),
        encoder=stack(num_layers, decodes=False),
        decoder=stack(decoder_layers, decodes=True),
        max_length=max_length,
        encoder_norm=norm(),
        norm=norm(),
        encoder_bias=bias(both_ways=True),
        decoder_bias=bias(both_ways=False),
        unembed=None if tied else Unembed(vocab_size, dim, vocab_multiple, std, dtype),
        start_id=start_id,
        hidden_scale=std if tied else 1.0,
        dropout=dropout,
    )


def _check(num_buckets: int, max_distance: int, start_id: int, vocab_size: int) -> None:
    if num_buckets < 4 or num_buckets % 4:
        raise UserError(f"num_buckets is {num_buckets}: must be a positive multiple of 4.")
    if not num_buckets // 2 < max_distance <= 2**20:
        raise UserError(
            f"max_distance is {max_distance}: must be above num_buckets / 2 = {num_buckets // 2}, "
            f"and at most {2**20}."
        )
    if not 0 <= start_id < vocab_size:
        raise UserError(f"start_id is {start_id}, beyond the vocabulary of {vocab_size}.")


def t5_v1_1(
    *,
    size: str = "small",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    hidden: int | None = None,
    vocab_size: int = 32128,
    max_length: int = 512,
    dropout: float = 0.0,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> EncoderDecoderLM:
    """T5 v1.1 small to XXL, and FLAN-T5, which has the same sizes.

    76,961,152, 247,577,856, 783,150,080, 2,849,757,184 and 11,135,332,352 parameters. Numbers that
    are given stand in the place of the preset's; v1.1 was pre-trained without dropout.
    """
    return _preset(T5_V1_1_SIZES, **locals())


def t5_v1_0(
    *,
    size: str = "small",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    hidden: int | None = None,
    vocab_size: int = 32128,
    max_length: int = 512,
    dropout: float = 0.1,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> EncoderDecoderLM:
    """The original T5 small to 11B.

    60,506,624, 222,903,552, 737,668,096, 2,851,598,336 and 11,307,321,344 parameters. Numbers
    that are given stand in the place of the preset's.
    """
    return _preset(T5_V1_0_SIZES, **locals(), gated=False, tied=True)


def _preset(
    sizes: dict[str, tuple[int, int, int, int, int]], *, size: str, **given: Any
) -> EncoderDecoderLM:
    """The preset of a size; numbers that are given stand in the place of the preset's."""
    if size not in sizes:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, sizes))
    names = ("num_layers", "dim", "num_heads", "head_dim", "hidden")
    numbers = dict(zip(names, sizes[size], strict=True))
    return t5(**(numbers | {name: x for name, x in given.items() if x is not None}))
