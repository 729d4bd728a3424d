"""Positions told to attention by distances."""

# Shape legend: H heads, N buckets, T queries, S keys.

from __future__ import annotations

import jax
from flax import linen as nn

from lmjax import sharding
from lmjax.ops.relative import relative_bias
from lmjax.sharding import shard


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances, which is added to scores.

    Source: Raffel et al. (T5), arXiv:1910.10683, section 2.1. One table serves all layers of a
    stack: compute it once and give it to each.

    Args:
      both_ways: keys after their query have buckets of their own, the later half of the table; else
        they share that of distance 0, for causal attention.
      max_distance: from there on all distances share one bucket.
    """

    num_heads: int
    both_ways: bool
    num_buckets: int = 32
    max_distance: int = 128
    init_std: float = 0.02

    @nn.compact
    def __call__(
        self, num_queries: int, num_keys: int, *, offset: jax.Array | int = 0
    ) -> jax.Array:
        """bias_HTS in float32; `offset` is the index among the keys of the first query."""
        init = nn.initializers.normal(self.init_std)
        shape = (self.num_buckets, self.num_heads)
        bias_NH = sharding.param(self, "bias", init, shape, ("positions", "heads"))
        bias_HTS = relative_bias(
            bias_NH,
            num_queries,
            num_keys,
            offset=offset,
            max_distance=self.max_distance,
            both_ways=self.both_ways,
        )
        return shard(bias_HTS, "act_heads", None, None)
