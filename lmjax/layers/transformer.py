"""Transformer blocks and their stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.layers.attention import Attention
from lmjax.layers.dropout import Dropout
from lmjax.layers.mlp import GeluMlp
from lmjax.sharding import shard

Remat = Literal["none", "dots", "full"]


class Block(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)), dropout on both branches."""

    attention_norm: nn.Module
    attention: Attention
    mlp_norm: nn.Module
    mlp: GeluMlp
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        cache: Any = None,
        layer: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Returns (x_BTD, cache)."""
        y_BTD, cache = self.attention(
            self.attention_norm(x_BTD),
            segments_BT=segments_BT,
            cache=cache,
            layer=layer,
            train=train,
        )
        x_BTD += Dropout(self.dropout)(y_BTD, train=train)
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        x_BTD += Dropout(self.dropout)(y_BTD, train=train)
        return shard(x_BTD, "batch", "residual", "act_embed"), cache

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass: (causal attention, full attention)."""
        causal, full = self.attention.flop_per_token(length)
        return causal + self.mlp.flop_per_token(), full + self.mlp.flop_per_token()


class Stack(nn.Module):
    """`num_layers` blocks of the same shape, their parameters stacked on a leading axis.

    Args:
      block: the template; its parameters get the axis `layers` in front.
      remat: what the backward pass computes again: nothing ('none'), all but the products with
        weights ('dots'), or everything inside a block ('full').
      unroll: how many layers stand in the body of the loop: 1 compiles fastest, `num_layers` leaves
        no loop and runs fastest. The parameters and the numbers are the same.
    """

    block: nn.Module
    num_layers: int
    remat: Remat = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, *, segments_BT: jax.Array | None, cache: Any, train: bool
    ) -> tuple[jax.Array, Any]:
        """Returns (x_BTD, cache)."""

        def body(block: Any, carry: Any, layer: jax.Array) -> tuple[Any, None]:
            x_BTD, cache = carry
            return block(
                x_BTD, segments_BT=segments_BT, cache=cache, layer=layer, train=train
            ), None

        loop: Callable[..., Any] = nn.scan(
            remat(body, self.remat) if cache is None else body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
            unroll=min(self.unroll, self.num_layers),
            metadata_params={"axis": "layers"},
        )
        carry, _ = loop(self.block, (x_BTD, cache), jnp.arange(self.num_layers))
        return carry


def remat(function: Callable[..., Any], policy: Remat) -> Callable[..., Any]:
    """Wraps `function(module, ...)`: its backward pass computes again what `policy` drops."""
    if policy == "none":
        return function
    keep = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}[policy]
    return nn.remat(function, policy=keep, prevent_cse=False)
