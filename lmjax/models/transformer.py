"""The Transformer for translation, base and big.

Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 3 and table 3.

One table is the embedding of sources, of targets and the output layer (section 3.4); token vectors
are multiplied by sqrt(dim), and sinusoids of the position added (section 3.5). Each branch is
normalised after it is added (section 3.1); so no norm follows a stack.

Departures:
  - None in what is computed. A target starts with `start_id`, which the paper does not name.
  - The paper does not say how kernels start; Glorot's normal distribution is used, where the
    authors' released code (tensor2tensor) draws from Glorot's uniform one of the same variance.

| parameter | initialisation |
|---|---|
| token embedding | normal, std dim**-0.5 |
| kernels | normal, std sqrt(2 / (inputs + outputs)) |
| biases, norm bias | 0 |
| norm scale | 1 |
"""

from __future__ import annotations

import math
from typing import Any, Literal

from lmjax.errors import UserError, did_you_mean
from lmjax.layers.attention import Attention
from lmjax.layers.cross_attention import CrossAttention
from lmjax.layers.embed import Embed
from lmjax.layers.mlp import ReluMlp
from lmjax.layers.norm import LayerNorm
from lmjax.layers.sinusoidal import SinusoidalPositions
from lmjax.layers.transformer import Block, Remat, Stack
from lmjax.models.decoder import check_heads, check_sizes
from lmjax.models.encoder_decoder import EncoderDecoderLM

Dtype = Literal["float32", "bfloat16"]

# name: (num_layers of each stack, dim, num_heads, hidden, dropout)
SIZES = {
    "nano": (2, 128, 4, 512, 0.1),  # not the paper's, as the next two: for a CPU and for tests
    "tiny": (3, 256, 4, 1024, 0.1),
    "small": (6, 512, 4, 1024, 0.3),  # for some hundred thousand pairs
    "base": (6, 512, 8, 2048, 0.1),
    "big": (6, 1024, 16, 4096, 0.3),
}


def transformer(
    *,
    size: str = "base",
    num_layers: int | None = None,
    num_decoder_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    hidden: int | None = None,
    dropout: float | None = None,
    vocab_size: int = 37000,
    max_length: int = 512,
    attention_dropout: float = 0.0,
    start_id: int = 0,
    vocab_multiple: int = 128,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> EncoderDecoderLM:
    """Base has 63,082,496 parameters and big 214,245,376, with 37,000 tokens.

    Numbers that are given stand in the place of the preset's.

    Args:
      num_layers: of the encoder, and of the decoder where `num_decoder_layers` is not given.
      hidden: hidden units of the MLPs.
      dropout: rate on embeddings and on what each branch adds.
      max_length: the longest source and target.
      attention_dropout: rate on the attention probabilities, of which the paper has none.
      start_id: the token before a target's first.
      vocab_multiple: the table is padded to a multiple of it.
      dtype: of the products' operands; parameters are float32.
      remat, unroll: see `Stack`.
    """
    if size not in SIZES:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, SIZES))
    *numbers, preset_rate = SIZES[size]
    given = (num_layers, dim, num_heads, hidden)
    layers, width, heads, units = (
        int(preset if x is None else x) for x, preset in zip(given, numbers, strict=True)
    )
    rate = preset_rate if dropout is None else dropout
    decoder_layers = layers if num_decoder_layers is None else num_decoder_layers
    check_sizes(
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        dim=width,
        num_heads=heads,
        hidden=units,
        vocab_size=vocab_size,
        max_length=max_length,
        vocab_multiple=vocab_multiple,
        unroll=unroll,
    )
    check_heads(width, heads)
    if width % 2:
        raise UserError(f"dim is {width}: sinusoids come in pairs; make it even.")
    for name, fraction in (("dropout", rate), ("attention_dropout", attention_dropout)):
        if not 0 <= fraction < 1:
            raise UserError(f"{name} is {fraction}: must be at least 0 and below 1.")
    if not 0 <= start_id < vocab_size:
        raise UserError(f"start_id is {start_id}, beyond the vocabulary of {vocab_size}.")
    attention: dict[str, Any] = {
        "dim": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "dropout": attention_dropout,
        "init_std": width**-0.5,
        "out_std": width**-0.5,
        "dtype": dtype,
    }
    mlp_std = math.sqrt(2 / (width + units))

    def stack(num: int, *, decodes: bool) -> Stack:
        block = Block(
            attention_norm=LayerNorm(dtype=dtype),
            attention=Attention(**attention, causal=decodes),
            mlp_norm=LayerNorm(dtype=dtype),
            mlp=ReluMlp(
                dim=width,
                hidden=units,
                init_std=mlp_std,
                out_std=mlp_std,
                dtype=dtype,
                use_bias=True,
            ),
            dropout=rate,
            norm_first=False,
            cross_norm=LayerNorm(dtype=dtype) if decodes else None,
            cross_attention=CrossAttention(**attention) if decodes else None,
        )
        return Stack(block=block, num_layers=num, remat=remat, unroll=unroll)

    return EncoderDecoderLM(
        embed=Embed(
            vocab_size,
            width,
            vocab_multiple,
            init_std=width**-0.5,
            dtype=dtype,
            scale=math.sqrt(width),
        ),
        encoder=stack(layers, decodes=False),
        decoder=stack(decoder_layers, decodes=True),
        max_length=max_length,
        positions=SinusoidalPositions(width, dtype=dtype),
        start_id=start_id,
        dropout=rate,
        returned_dropout=0.0,
    )
