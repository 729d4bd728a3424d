"""Gemma 2 and Gemma 3, the text models.

Sources: Gemma Team, "Gemma 2", arXiv:2408.00118, table 1 and section 2; "Gemma 3 Technical Report",
arXiv:2503.19786, section 2; heads, hidden units and vocabularies as in the published
configurations.

To Llama (`lmjax.models.llama`) they add: token vectors times sqrt(dim), which the output layer
shares as they are; norms whose scale is 1 + the parameter, also on what attention and MLP add to
the residual stream; GeGLU; a window on most layers, whose queries and keys in Gemma 3 turn by a
base of their own; and in Gemma 2 soft-caps of scores and logits, in Gemma 3 norms of each head's
queries and keys in their place.

Departures:
  - The reports give no initialisation; here it is Llama's.

| parameter | initialisation |
|---|---|
| token embedding, kernels | normal, std 0.02 |
| attention out, mlp down | normal, std 0.02 / sqrt(2 num_layers) |
| norm scale | 0 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lmjax.errors import UserError, did_you_mean
from lmjax.layers.attention import residual_std
from lmjax.layers.mlp import GeGlu
from lmjax.layers.transformer import Remat
from lmjax.models.decoder import DecoderLM, check_sizes
from lmjax.models.llama import INIT_STD, Departures, Dtype, rotary_decoder
from lmjax.ops.rope import LinearScaling, Rope, Scaling


def gemma(
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
    window_layers: tuple[bool, ...] | None = None,
    window_rope_theta: float | None = None,
    window_rope_scaling: Scaling | None = None,
    rope_theta: float = 10_000.0,
    rope_scaling: Scaling | None = None,
    query_scale: float | None = None,
    attention_softcap: float | None = None,
    logit_softcap: float | None = None,
    qk_norm: bool = False,
    tied: bool = True,
    epsilon: float = 1e-6,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """A Gemma of any size, and of the second or third generation by its settings.

    Args:
      window: in layers that have one a token sees so many tokens, itself the last.
      window_layers: for each layer whether it has the window; all have it where not given.
      window_rope_theta, window_rope_scaling: the rotation of those layers; `rope_theta` and
        `rope_scaling` where the first is not given.
      query_scale: factor of the attention scores; 1 / sqrt(head_dim) where not given.
      attention_softcap: scores s become softcap * tanh(s / softcap).
      logit_softcap: likewise the logits.
      qk_norm: each head's queries and keys are normalised.

    For the others see `llama`.
    """
    check_sizes(num_layers=num_layers, dim=dim, hidden=hidden)
    window_rope = None
    if window_rope_theta is not None:
        window_rope = Rope(theta=window_rope_theta, scaling=window_rope_scaling)
    elif window_rope_scaling is not None:
        raise UserError("window_rope_scaling is given, and window_rope_theta is None: set it too.")
    out_std = residual_std(INIT_STD, num_layers)
    mlp = GeGlu(dim=dim, hidden=hidden, init_std=INIT_STD, out_std=out_std, dtype=dtype)
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
            qk_norm=qk_norm,
            window=window,
            window_layers=window_layers,
            window_rope=window_rope,
            query_scale=query_scale,
            attention_softcap=attention_softcap,
            logit_softcap=logit_softcap,
            post_norms=True,
            norm_offset=1.0,
            embed_scale=math.sqrt(dim),
        ),
    )


@dataclass(frozen=True)
class Size:
    """A published model.

    Args:
      score_dim: scores are divided by its root.
      window: of the layers that have one.
      stretch: factor of the linear scaling of the other layers' rotation.
    """

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    score_dim: int = 256
    window: int = 4096
    stretch: float | None = None
    vocab_size: int = 262208
    max_length: int = 131072


GEMMA2_SIZES = {
    "2b": Size(26, 2304, 8, 4, 256, 9216),
    "9b": Size(42, 3584, 16, 8, 256, 14336),
    "27b": Size(46, 4608, 32, 16, 128, 36864, score_dim=144),
}
GEMMA3_SIZES = {
    "270m": Size(18, 640, 4, 1, 256, 2048, window=512, vocab_size=262144, max_length=32768),
    "1b": Size(26, 1152, 4, 1, 256, 6912, window=512, vocab_size=262144, max_length=32768),
    "4b": Size(34, 2560, 8, 4, 256, 10240, window=1024, stretch=8.0),
    "12b": Size(48, 3840, 16, 8, 256, 15360, window=1024, stretch=8.0),
    "27b": Size(62, 5376, 32, 16, 128, 21504, score_dim=168, window=1024, stretch=8.0),
}


def gemma2(
    *,
    size: str = "2b",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    window: int | None = None,
    vocab_size: int = 256000,
    max_length: int = 8192,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """Gemma 2 2B, 9B and 27B: 2,614,341,888, 9,241,705,984 and 27,227,128,320 parameters.

    Every second layer sees all, the others a window. Numbers that are given stand in the place of
    the preset's.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    fields = _preset(GEMMA2_SIZES, period=2, given=given)
    return gemma(**fields, attention_softcap=50.0, logit_softcap=30.0)


def gemma3(
    *,
    size: str = "4b",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    window: int | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """Gemma 3 270M, 1B, 4B, 12B and 27B without what sees pictures.

    In their order 268,098,176, 999,885,952, 3,880,263,168, 11,766,034,176 and 27,009,346,304
    parameters. Every sixth layer sees all, the others a window. Numbers that are given stand in the
    place of the preset's.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    fields = _preset(GEMMA3_SIZES, period=6, given=given)
    return gemma(**fields, rope_theta=1e6, window_rope_theta=10_000.0, qk_norm=True)


def _preset(sizes: dict[str, Size], *, period: int, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `gemma` that a preset and the given numbers say, windows by their period."""
    size = given.pop("size")
    if size not in sizes:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, sizes))
    preset = vars(sizes[size]) | given
    stretch, score_dim = preset.pop("stretch"), preset.pop("score_dim")
    if "dim" in given or "num_heads" in given:
        preset["head_dim"] = None
    else:
        preset["query_scale"] = score_dim**-0.5
    preset["rope_scaling"] = None if stretch is None else LinearScaling(factor=stretch)
    check_sizes(num_layers=preset["num_layers"])
    layers = range(1, preset["num_layers"] + 1)
    preset["window_layers"] = tuple(layer % period != 0 for layer in layers)
    return preset
