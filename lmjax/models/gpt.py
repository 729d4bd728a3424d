"""GPT-2 and GPT-3.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2, and
its released code; Brown et al., "Language Models are Few-Shot Learners", arXiv:2005.14165, table
2.1.

Departures:
  - GPT-3 alternates dense and locally banded sparse attention; here all layers are dense.
  - Table 2.1 gives the 1.3B model 24 heads of 128, which is 3,072 wide at d_model 2,048 and 1.5 B
    parameters; it has 16 heads here, as its name and the rest of the table say.

| parameter | initialisation |
|---|---|
| token embedding, kernels | normal, std 0.02 |
| position embedding | normal, std 0.01 (the released code of GPT-2) |
| attention out, mlp down | normal, std 0.02 / sqrt(2 num_layers) |
| biases, norm bias | 0 |
| norm scale | 1 |
"""

from __future__ import annotations

from typing import Any, Literal

from lmjax.errors import UserError, did_you_mean
from lmjax.layers.attention import Attention, residual_std
from lmjax.layers.embed import Embed, LearnedPositions
from lmjax.layers.mlp import GeluMlp
from lmjax.layers.norm import LayerNorm
from lmjax.layers.transformer import Block, Remat, Stack
from lmjax.models.decoder import DecoderLM, check_heads, check_sizes

# name: (num_layers, dim, num_heads, head_dim)
GPT2_SIZES = {
    "124m": (12, 768, 12, 64),
    "355m": (24, 1024, 16, 64),
    "774m": (36, 1280, 20, 64),
    "1.5b": (48, 1600, 25, 64),
}
GPT3_SIZES = {
    "nano": (4, 256, 8, 32),  # not OpenAI's: for a CPU and for tests
    "125m": (12, 768, 12, 64),
    "350m": (24, 1024, 16, 64),
    "760m": (24, 1536, 16, 96),
    "1.3b": (24, 2048, 16, 128),
    "2.7b": (32, 2560, 32, 80),
    "6.7b": (32, 4096, 32, 128),
    "13b": (40, 5140, 40, 128),
    "175b": (96, 12288, 96, 128),
}
Dtype = Literal["float32", "bfloat16"]


def gpt(
    *,
    num_layers: int,
    dim: int,
    num_heads: int,
    vocab_size: int,
    max_length: int,
    head_dim: int | None = None,
    dropout: float = 0.0,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """A GPT of any size.

    Args:
      head_dim: dim / num_heads where not given.
      dropout: rate on embeddings, attention probabilities and both branches of each block.
      vocab_multiple: the embedding table is padded to a multiple of it.
      dtype: of the products' operands; parameters are float32.
      remat: see `Stack`.
      unroll: see `Stack`.
    """
    check_sizes(
        num_layers=num_layers,
        dim=dim,
        num_heads=num_heads,
        vocab_size=vocab_size,
        max_length=max_length,
        vocab_multiple=vocab_multiple,
        unroll=unroll,
        head_dim=1 if head_dim is None else head_dim,
    )
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: must be at least 0 and below 1.")
    if head_dim is None:
        check_heads(dim, num_heads)
    std = 0.02
    out_std = residual_std(std, num_layers)
    block = Block(
        attention_norm=LayerNorm(dtype=dtype),
        attention=Attention(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=dim // num_heads if head_dim is None else head_dim,
            dropout=dropout,
            init_std=std,
            out_std=out_std,
            dtype=dtype,
        ),
        mlp_norm=LayerNorm(dtype=dtype),
        mlp=GeluMlp(dim=dim, hidden=4 * dim, init_std=std, out_std=out_std, dtype=dtype),
        dropout=dropout,
    )
    return DecoderLM(
        embed=Embed(vocab_size, dim, vocab_multiple=vocab_multiple, init_std=std, dtype=dtype),
        positions=LearnedPositions(max_length, dim, dtype=dtype),
        blocks=Stack(block=block, num_layers=num_layers, remat=remat, unroll=unroll),
        norm=LayerNorm(dtype=dtype),
        max_length=max_length,
        dropout=dropout,
    )


def gpt2(
    *,
    size: str = "124m",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    vocab_size: int = 50257,
    max_length: int = 1024,
    dropout: float = 0.1,
    vocab_multiple: int = 128,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """GPT-2 small to XL: 124,439,808, 354,823,168, 774,030,080 and 1,557,611,200 parameters."""
    return _preset(GPT2_SIZES, **locals())


def gpt3(
    *,
    size: str = "125m",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    vocab_size: int = 50257,
    max_length: int = 2048,
    dropout: float = 0.0,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """GPT-3 from 125M (125,226,240 parameters) to 175B (174,604,259,328)."""
    return _preset(GPT3_SIZES, **locals())


def _preset(
    sizes: dict[str, tuple[int, int, int, int]],
    *,
    size: str,
    num_layers: int | None,
    dim: int | None,
    num_heads: int | None,
    **fields: Any,
) -> DecoderLM:
    """The preset of a size; numbers that are given stand in the place of the preset's."""
    if size not in sizes:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, sizes))
    layers, width, heads, head_dim = sizes[size]
    return gpt(
        num_layers=layers if num_layers is None else num_layers,
        dim=width if dim is None else dim,
        num_heads=heads if num_heads is None else num_heads,
        head_dim=head_dim if dim is None and num_heads is None else None,
        **fields,
    )
