"""Mixtures of experts: Mixtral, those of Qwen 1.5, 2 and 3, a model of DeepSeek-V3's shape.

Sources: Jiang et al., "Mixtral of Experts", arXiv:2401.04088, table 1; DeepSeek-AI, "DeepSeek-V3
Technical Report", arXiv:2412.19437, section 4.2; Qwen Team, "Qwen2 Technical Report",
arXiv:2407.10671, table 1, and the published configuration of Qwen1.5-MoE-A2.7B; "Qwen3 Technical
Report", arXiv:2505.09388, table 2.

Departures:
  - DeepSeek-V3 attends through a latent vector (MLA), with 187 M parameters a layer; `671b` has
    grouped-query attention of 96 heads and 8 key-value heads of 128 in its place, with 191 M.
  - DeepSeek-V3 balances its experts by a bias on their scores and restricts a token to 4 nodes;
    here the auxiliary losses alone balance, and a token may go anywhere. There is no multi-token
    prediction.
  - Initialisation is Llama's (`lmjax.models.llama`), the router, the gate of the shared experts and
    the experts' gate and up with std 0.02, their down with 0.02 / sqrt(2 num_layers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from flax import linen as nn

from lmjax.errors import UserError, did_you_mean
from lmjax.layers.attention import residual_std
from lmjax.layers.mlp import SwiGlu
from lmjax.layers.moe import Moe, Routing, Scores
from lmjax.layers.transformer import Remat
from lmjax.models.decoder import DecoderLM, check_sizes
from lmjax.models.llama import INIT_STD, Departures, Dtype, rotary_decoder
from lmjax.ops.rope import Rope, Scaling


def moe(
    *,
    num_layers: int,
    dim: int,
    num_heads: int,
    vocab_size: int,
    max_length: int,
    num_experts: int,
    experts_per_token: int,
    expert_hidden: int,
    num_shared_experts: int = 0,
    shared_hidden: int | None = None,
    gated_shared: bool = False,
    num_dense_layers: int = 0,
    mixture_layers: tuple[bool, ...] | None = None,
    dense_hidden: int | None = None,
    scores: Scores = "softmax",
    normalise: bool = True,
    scale: float = 1.0,
    routing: Routing = "dropless",
    capacity_factor: float = 1.25,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope_theta: float = 10_000.0,
    rope_scaling: Scaling | None = None,
    epsilon: float = 1e-5,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    vocab_multiple: int = 1,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """A Llama whose MLPs, but for those of some layers, are mixtures of experts.

    Its losses `load_balance_loss` and `router_z_loss` are descended where `CausalLM.aux_losses`
    gives them a weight.

    Args:
      expert_hidden: hidden units of one expert.
      num_shared_experts: so many experts' width that every token goes through.
      shared_hidden: that width in hidden units, in the place of `num_shared_experts`.
      num_dense_layers: layers at the start whose MLP is dense.
      mixture_layers: for each layer whether its MLP is a mixture, in the place of
        `num_dense_layers`. Each run of like layers is a stack, compiled for itself.
      dense_hidden: hidden units of the dense MLPs.
      gated_shared, scores, normalise, scale, routing, capacity_factor: see `Moe`.
      qkv_bias: queries, keys and values have biases, as in Qwen 1.5 and 2.
      qk_norm: each head's queries and keys are normalised, as in Qwen 3.

    For the others see `llama`.
    """
    check_sizes(
        num_layers=num_layers,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_hidden=expert_hidden,
    )
    if experts_per_token > num_experts:
        raise UserError(
            f"experts_per_token is {experts_per_token}, and num_experts {num_experts}: a token "
            "goes to different experts, so the first may not exceed the second."
        )
    if num_shared_experts < 0 or not 0 <= num_dense_layers < num_layers:
        raise UserError(
            f"num_shared_experts is {num_shared_experts} and num_dense_layers {num_dense_layers}: "
            f"give at least 0 of each, and fewer dense layers than num_layers, {num_layers}."
        )
    runs = [(False, num_dense_layers), (True, num_layers - num_dense_layers)]
    if mixture_layers is not None:
        _check_layers(mixture_layers, num_layers, num_dense_layers)
        runs = [(is_mixture, len(list(run))) for is_mixture, run in groupby(mixture_layers)]
    if dense_hidden is None and any(count and not is_mixture for is_mixture, count in runs):
        raise UserError("dense_hidden is None: the dense layers need at least 1.")
    if dense_hidden is not None:
        check_sizes(dense_hidden=dense_hidden)
    if shared_hidden is not None and num_shared_experts:
        raise UserError(
            f"num_shared_experts is {num_shared_experts} and shared_hidden {shared_hidden}: "
            "both say how wide the shared experts are, so give one of them."
        )
    shared = num_shared_experts * expert_hidden if shared_hidden is None else shared_hidden
    check_sizes(shared_hidden=1 if shared == 0 else shared)
    if gated_shared and not shared:
        raise UserError("gated_shared is True and there are no shared experts: set shared_hidden.")
    if scores == "sigmoid" and not normalise:
        raise UserError("normalise is False, which is for softmax scores, and scores is 'sigmoid'.")
    if not (0 < capacity_factor < math.inf and 0 < scale < math.inf):
        raise UserError(
            f"capacity_factor is {capacity_factor} and scale {scale}: "
            "both must be positive and finite."
        )
    out_std = residual_std(INIT_STD, num_layers)
    mixture = partial(
        Moe,
        dim=dim,
        hidden=expert_hidden,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        shared_hidden=shared,
        gated_shared=gated_shared,
        scores=scores,
        normalise=normalise,
        scale=scale,
        routing=routing,
        capacity_factor=capacity_factor,
        init_std=INIT_STD,
        out_std=out_std,
        dtype=dtype,
    )
    layers: list[tuple[int, nn.Module]] = []  # modules of their own: a shared one shares weights
    for is_mixture, count in runs:
        if is_mixture:
            layers.append((count, mixture()))
        elif count and dense_hidden is not None:
            dense = SwiGlu(dim, dense_hidden, init_std=INIT_STD, out_std=out_std, dtype=dtype)
            layers.append((count, dense))
    return rotary_decoder(
        layers,
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_length=max_length,
        rope=Rope(theta=rope_theta, scaling=rope_scaling),
        tied=False,
        epsilon=epsilon,
        vocab_multiple=vocab_multiple,
        dtype=dtype,
        remat=remat,
        unroll=unroll,
        departures=Departures(qkv_bias=qkv_bias, qk_norm=qk_norm),
    )


def _check_layers(mixture_layers: Sequence[bool], num_layers: int, num_dense_layers: int) -> None:
    """Raises UserError for a choice of layers that cannot be meant."""
    if len(mixture_layers) != num_layers:
        raise UserError(
            f"mixture_layers speaks of {len(mixture_layers)} layers, and num_layers is "
            f"{num_layers}: give one truth value for each layer."
        )
    if num_dense_layers:
        raise UserError(
            f"num_dense_layers is {num_dense_layers} and mixture_layers is given: both say which "
            "layers are dense, so give one of them."
        )
    if not any(mixture_layers):
        raise UserError("mixture_layers has no True: a model without mixtures is a `llama`.")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's numbers, by the names of `moe`'s arguments."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_hidden: int
    num_shared_experts: int = 0
    shared_hidden: int | None = None
    gated_shared: bool = False
    num_dense_layers: int = 0
    dense_hidden: int | None = None
    scores: Scores = "softmax"
    normalise: bool = True
    scale: float = 1.0
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False


SIZES = {
    "nano": Size(  # of nobody's: for a CPU and for tests
        num_layers=4,
        dim=192,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        num_experts=4,
        experts_per_token=2,
        expert_hidden=256,
        num_shared_experts=1,
    ),
    "8x7b": Size(
        num_layers=32,
        dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        experts_per_token=2,
        expert_hidden=14336,
        rope_theta=1e6,
    ),
    "a2.7b": Size(
        num_layers=24,
        dim=2048,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        num_experts=60,
        experts_per_token=4,
        expert_hidden=1408,
        shared_hidden=5632,
        gated_shared=True,
        normalise=False,
        rope_theta=1e6,
        epsilon=1e-6,
        qkv_bias=True,
    ),
    "57b-a14b": Size(
        num_layers=28,
        dim=3584,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        num_experts=64,
        experts_per_token=8,
        expert_hidden=2560,
        shared_hidden=20480,
        gated_shared=True,
        normalise=False,
        rope_theta=1e6,
        epsilon=1e-6,
        qkv_bias=True,
    ),
    "30b-a3b": Size(
        num_layers=48,
        dim=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_hidden=768,
        rope_theta=1e6,
        epsilon=1e-6,
        qk_norm=True,
    ),
    "235b-a22b": Size(
        num_layers=94,
        dim=4096,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_hidden=1536,
        rope_theta=1e6,
        epsilon=1e-6,
        qk_norm=True,
    ),
    "671b": Size(
        num_layers=61,
        dim=7168,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        num_experts=256,
        experts_per_token=8,
        expert_hidden=2048,
        num_shared_experts=1,
        num_dense_layers=3,
        dense_hidden=18432,
        scores="sigmoid",
        scale=2.5,
        epsilon=1e-6,
    ),
}


def moe_preset(
    *,
    size: str = "8x7b",
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    num_experts: int | None = None,
    experts_per_token: int | None = None,
    expert_hidden: int | None = None,
    num_shared_experts: int | None = None,
    shared_hidden: int | None = None,
    num_dense_layers: int | None = None,
    dense_hidden: int | None = None,
    scores: Scores | None = None,
    scale: float | None = None,
    routing: Routing = "dropless",
    capacity_factor: float = 1.25,
    vocab_size: int = 32000,
    max_length: int = 32768,
    vocab_multiple: int = 128,
    dtype: Dtype = "bfloat16",
    remat: Remat = "none",
    unroll: int = 1,
) -> DecoderLM:
    """Mixtral 8x7B (46,702,792,704 parameters), Qwen's mixtures, and DeepSeek-V3's shape.

    Qwen1.5-MoE-A2.7B ('a2.7b') has 14,315,784,192, Qwen2-57B-A14B 57,408,658,944, Qwen 3 30B-A3B
    30,532,122,624 and 235B-A22B 235,093,634,560 with those models' vocabulary of 151,936 tokens,
    671b 671,254,148,096 with DeepSeek-V3's of 129,280. Numbers that are given stand in the place of
    the preset's.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    if given.pop("size") not in SIZES:
        raise UserError(f"no preset of size {size!r}." + did_you_mean(size, SIZES))
    preset = vars(SIZES[size]) | given
    if dim is not None or num_heads is not None:
        preset["head_dim"] = None
    if num_shared_experts is not None and shared_hidden is None:
        preset["shared_hidden"] = None
    if shared_hidden is not None and num_shared_experts is None:
        preset["num_shared_experts"] = 0
    return moe(**preset)
