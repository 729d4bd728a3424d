"""What a block keeps for its backward pass, and what it computes again.

The tensors of a block that can be named are, in the order in which they arise:

| name | tensor | elements per token |
|---|---|---|
| block | the block's input, as its residuals are split | D |
| qkv | queries, keys and values | (H + 2 G) K |
| attention | what attention returns, before its output projection | H K |
| out | the output projection of attention | D |
| gate, up | the products into an MLP's hidden units | F each |
| down | the product out of them | D |

D embed, H query heads, G key-value heads, K head dim, F hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from lmjax import sharding
from lmjax.errors import UserError, did_you_mean
from lmjax.ops.spread import GATHERED

TENSORS = ("block", "qkv", "attention", "out", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """A policy by tensor: what it does not name is computed again.

    `block`, where the computing starts, is kept unless it is offloaded. Raises UserError for a name
    that is not in `TENSORS`, or stands in both.

    Args:
      keep: names of tensors that stay in the device's memory.
      offload: names of tensors that wait in the host's (pinned) memory, copied there and back while
        the device computes. On a CPU the two memories are one.
    """

    keep: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.keep, *self.offload):
            if name not in TENSORS:
                raise UserError(
                    f"remat names a tensor {name!r}; those of a block are {', '.join(TENSORS)}."
                    + did_you_mean(name, TENSORS)
                )
        if both := set(self.keep) & set(self.offload):
            raise UserError(f"remat both keeps and offloads {', '.join(sorted(both))}: choose one.")


Remat = Literal["none", "dots", "attention", "full", "offload"] | Tensors

POLICIES = {
    "dots": Tensors(keep=("qkv", "out", "gate", "up", "down")),
    "attention": Tensors(keep=("qkv", "attention")),
    "full": Tensors(),
    "offload": Tensors(offload=("block",)),
}


def named(x: jax.Array, name: str) -> jax.Array:
    """`x`, which policies know by that name."""
    return checkpoint_name(x, name)


def rule(policy: Remat) -> Callable[..., Any] | None:
    """The policy in the form that `jax.checkpoint` and `nn.remat` take; None to keep everything.

    What devices gather from each other (weights that are split, the tokens of neighbours) no policy
    keeps: it would undo the split, and is gathered again.
    """
    if policy == "none":
        save_all_but = jax.checkpoint_policies.save_anything_except_these_names
        return save_all_but(GATHERED) if sharding.split() else None
    tensors = POLICIES[policy] if isinstance(policy, str) else policy
    if not tensors.offload:
        return jax.checkpoint_policies.save_only_these_names(*tensors.keep)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=tensors.keep,
        names_which_can_be_offloaded=tensors.offload,
        offload_src="device",
        offload_dst="pinned_host",
    )
