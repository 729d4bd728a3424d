"""A mixture of experts in the place of a block's MLP.

B batch, T length, D embed, F hidden units of an expert, E experts, k experts of a token.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lmjax import sharding
from lmjax.core import Mean
from lmjax.layers.mlp import SwiGlu
from lmjax.ops.experts import Kernels, capacity, dropless
from lmjax.ops.matmul import travelling_dtype
from lmjax.ops.routing import (
    load_balance_loss,
    router_logits,
    router_z_loss,
    sigmoid_top_k,
    softmax_top_k,
)
from lmjax.ops.spread import complete

Scores = Literal["softmax", "sigmoid"]
Routing = Literal["dropless", "capacity"]


class Moe(nn.Module):
    """Sum over a token's k best experts of weight * SwiGLU(x), beside experts that take them all.

    Sources: Mixtral, arXiv:2401.04088, section 2.1; shared and fine-grained experts: DeepSeekMoE,
    arXiv:2401.06066, equations 9 to 11; the gate of the shared ones: Qwen1.5-MoE
    (`transformers.models.qwen2_moe`).

    The experts are split over the mesh axis `expert`, over which tokens are split too: each goes to
    the owners of its experts and returns. Hidden units are split over `tensor`, kernels besides
    over `fsdp`, gathered right before their use and their gradient reduce-scattered.

    Args:
      hidden: hidden units of one expert.
      experts_per_token: k.
      shared_hidden: hidden units of one dense SwiGLU that every token goes through; 0 for none.
      gated_shared: what that adds is multiplied by the sigmoid of a product of x with a vector.
      scores: 'softmax' as in Mixtral, 'sigmoid' as in DeepSeek-V3 (`ops.routing`).
      normalise: whether the weights of a token's experts sum to 1; else softmax scores weigh as
        they are among all experts.
      scale: factor on the weights of sigmoid scores.
      routing: 'dropless', or 'capacity': an expert takes at most `capacity_factor` times its even
        share of each row of the batch, and the rest of the row passes it by.
      out_std: standard deviation of the initialisation of the last product of each expert.
    """

    dim: int
    hidden: int
    num_experts: int
    experts_per_token: int
    shared_hidden: int = 0
    gated_shared: bool = False
    scores: Scores = "softmax"
    normalise: bool = True
    scale: float = 1.0
    routing: Routing = "dropless"
    capacity_factor: float = 1.25
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns y_BTD and, as means over tokens, `load_balance_loss`, `router_z_loss` and, where
        there is a capacity, `dropped_fraction` (of the copies of tokens).
        """
        D, F, E, k = self.dim, self.hidden, self.num_experts, self.experts_per_token
        init, out_init = map(nn.initializers.normal, (self.init_std, self.out_std))
        wide, narrow = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        router_DE = sharding.param(self, "router_kernel", init, (D, E), ("embed", None))
        kernels = Kernels(
            gate=sharding.param(self, "gate_kernel", init, (E, D, F), wide),
            up=sharding.param(self, "up_kernel", init, (E, D, F), wide),
            down=sharding.param(self, "down_kernel", out_init, (E, F, D), narrow),
        )
        logits_BTE = router_logits(x_BTD, router_DE)
        if self.scores == "softmax":
            experts_BTk, weights_BTk, probs_BTE = softmax_top_k(
                logits_BTE, k, normalise=self.normalise
            )
        else:
            experts_BTk, weights_BTk, probs_BTE = sigmoid_top_k(logits_BTE, k, scale=self.scale)
        aux = {
            "load_balance_loss": load_balance_loss(experts_BTk, probs_BTE),
            "router_z_loss": router_z_loss(logits_BTE),
        }
        batch, length, residual = _names(*x_BTD.shape[:2])
        tokens = (batch, length, None)
        y_BTD, dropped_BT = sharding.per_device(
            partial(self._experts, scatter=residual == "residual"),
            in_axes=(tokens, tokens, tokens, wide, wide, narrow),
            out_axes=((batch, residual, None), (batch, length)),
        )(x_BTD, experts_BTk, weights_BTk, *kernels)
        if self.routing == "capacity":
            dropped = jnp.sum(dropped_BT)
            aux["dropped_fraction"] = Mean(dropped, jnp.float32(experts_BTk.size))
        if self.shared_hidden:
            shared = SwiGlu(
                D, self.shared_hidden, self.init_std, self.out_std, self.dtype, name="shared"
            )
            added_BTD = shared(x_BTD)[0]
            if self.gated_shared:
                gate_D1 = sharding.param(self, "shared_gate", init, (D, 1), ("embed", None))
                gate_BT1 = jax.nn.sigmoid(router_logits(x_BTD, gate_D1))
                added_BTD *= gate_BT1.astype(added_BTD.dtype)
            y_BTD += added_BTD
        return y_BTD, aux

    def _experts(
        self,
        x_BTD: jax.Array,
        experts_BTk: jax.Array,
        weights_BTk: jax.Array,
        *kernels: jax.Array,
        scatter: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """One device's tokens through the experts; `scatter` leaves each rank its part of T."""

        travelling = travelling_dtype(self.dtype)
        parts = zip(kernels, (1, 1, 2), strict=True)
        whole = Kernels(*(complete(w, "embed", axis, dtype=travelling) for w, axis in parts))
        arguments = x_BTD, experts_BTk, weights_BTk, whole
        E, dtype = self.num_experts, self.dtype
        if self.routing == "dropless":
            y_BTD = dropless(*arguments, num_experts=E, dtype=dtype)
            dropped_BT = jnp.zeros(x_BTD.shape[:2])
        else:
            factor = self.capacity_factor
            y_BTD, dropped_BT = capacity(*arguments, num_experts=E, factor=factor, dtype=dtype)
        if sharding.axis_size("tensor") > 1:
            if scatter:
                y_BTD = lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True)
            else:
                y_BTD = lax.psum(y_BTD, "tensor")
        return y_BTD, dropped_BT

    def flop_per_token(self) -> float:
        """FLOP of one token's forward pass, through the experts that it visits."""
        visited = self.experts_per_token * self.hidden + self.shared_hidden
        return 2.0 * self.dim * (self.num_experts + self.gated_shared) + 6.0 * self.dim * visited


def _names(num_rows: int, length: int) -> tuple[str | None, str | None, str | None]:
    """How rows, length in and length out are split; not at all what the mesh does not divide."""
    split = "length" if length % sharding.ways("length") == 0 else None
    return (
        "batch" if num_rows % sharding.ways("batch") == 0 else None,
        split,
        "residual" if length % sharding.ways("residual") == 0 else split,
    )
