"""Attention from one sequence to another, with an optional cache.

B batch, T queries, M memory length, D embed, H query heads, G key-value heads, K head dim,
L layers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.layers.linear import Linear, Part
from lmjax.layers.remat import named
from lmjax.ops.attention import attention
from lmjax.ops.matmul import activation_dtype
from lmjax.sharding import shard


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, queries of x and keys and values of a memory, back to D.

    Source: Vaswani et al., arXiv:1706.03762, section 3.2.3 ("encoder-decoder attention"). Keys and
    values are one kernel [D, G, 2, K]. In a cache they are computed once: the call that is given a
    memory stores them, later ones read them. Remat policies know q, k and v by the name `qkv`.

    Args:
      init_std: standard deviation of the initialisation of the products into keys and values, and
        into queries where `query_std` is not given.
      out_std: of the output projection.
      dropout: rate on the attention probabilities.
      query_scale: factor of the scores in the place of 1/sqrt(K).
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dropout: float = 0.0
    init_std: float = 0.02
    out_std: float = 0.02
    query_std: float | None = None
    use_bias: bool = True
    query_scale: float | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        memory_BMD: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        memory_segments_BM: jax.Array | None = None,
        cache: Any = None,
        layer: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Attends to the memory, or without one to what the cache of this layer holds of it.

        A token sees what of the memory has its own segment; segment 1 is that of all tokens without
        `segments_BT`. Returns (y_BTD, cache).
        """
        B, T, _ = x_BTD.shape
        q_BTHK = Linear(
            features=(self.num_heads, self.head_dim),
            axes=("embed", "heads", "head_dim"),
            use_bias=self.use_bias,
            init_std=self.init_std if self.query_std is None else self.query_std,
            dtype=self.dtype,
            parts=(Part("query", 0, 0, self.num_heads),),
            name="q",
        )(x_BTD)
        q_BTHK = named(shard(q_BTHK, "batch", "length", "act_heads", None), "qkv")
        if self.query_scale is not None:
            q_BTHK *= self.query_scale * math.sqrt(self.head_dim)
        if memory_BMD is not None:
            kv_BMG2K = Linear(
                features=(self.num_kv_heads, 2, self.head_dim),
                axes=("embed", "kv_heads", None, "head_dim"),
                use_bias=self.use_bias,
                init_std=self.init_std,
                dtype=self.dtype,
                parts=(Part("key", 1, 0, 1), Part("value", 1, 1, 2)),
                name="kv",
            )(memory_BMD)
            kv_BMG2K = named(kv_BMG2K, "qkv")
            k_BMGK, v_BMGK = kv_BMG2K[:, :, :, 0], kv_BMG2K[:, :, :, 1]
        if cache is not None:
            assert layer is not None  # a cache holds all layers: which one is this?
            cache = dict(cache)
            if memory_BMD is not None:
                for name, new in (("cross_key", k_BMGK), ("cross_value", v_BMGK)):
                    rows_LBGMK = cache[name]
                    new_BGMK = jnp.swapaxes(new, 1, 2).astype(rows_LBGMK.dtype)
                    cache[name] = jax.lax.dynamic_update_index_in_dim(
                        rows_LBGMK, new_BGMK, layer, axis=0
                    )
            k_BMGK, v_BMGK = (
                jnp.swapaxes(jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False), 1, 2)
                for name in ("cross_key", "cross_value")
            )
        if segments_BT is None and memory_segments_BM is not None:
            segments_BT = jnp.ones((B, T), jnp.int32)
        use_dropout = train and self.dropout > 0
        y_BTHK = attention(
            q_BTHK,
            shard(k_BMGK, "batch", "length", "act_kv_heads", None),
            shard(v_BMGK, "batch", "length", "act_kv_heads", None),
            causal=False,
            segments_q_BT=segments_BT,
            segments_kv_BS=memory_segments_BM,
            dropout_rate=self.dropout if use_dropout else 0.0,
            dropout_rng=self.make_rng("dropout") if use_dropout else None,
            dtype=self.dtype,
        )
        y_BTD = Linear(
            features=(self.dim,),
            axes=("heads", "head_dim", "embed"),
            in_dims=2,
            use_bias=self.use_bias,
            init_std=self.out_std,
            dtype=self.dtype,
            name="out",
        )(named(y_BTHK, "attention"))
        return y_BTD, cache

    def init_cache(self, num_layers: int, batch_size: int, length: int) -> dict[str, jax.Array]:
        """Room for keys and values of a memory of `length` tokens, in all layers."""
        shape = (num_layers, batch_size, self.num_kv_heads, length, self.head_dim)
        zeros = jnp.zeros(shape, activation_dtype(self.dtype))
        return {"cross_key": zeros, "cross_value": jnp.array(zeros)}

    def flop(self, num_queries: int, num_keys: int) -> float:
        """FLOP of the forward pass of so many tokens over a memory of so many."""
        inner = self.num_heads * self.head_dim
        of_queries = 4.0 * self.dim * inner * num_queries
        of_memory = 4.0 * self.dim * self.num_kv_heads * self.head_dim * num_keys
        return of_queries + of_memory + 4.0 * inner * num_queries * num_keys
