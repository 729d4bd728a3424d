"""Multi-head and grouped-query self-attention with an optional cache.

B batch, T query length, S cache length, D embed, H query heads, G key-value heads, K head dim,
L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.layers.linear import Linear, Part
from lmjax.layers.remat import named
from lmjax.ops.attention import attention
from lmjax.ops.matmul import activation_dtype
from lmjax.ops.rope import Rope, rotate
from lmjax.sharding import shard


class Attention(nn.Module):
    """Self-attention: softmax(q k^T / sqrt(K)) v, projected back to D.

    Source: Vaswani et al., arXiv:1706.03762, section 3.2; grouped heads: Ainslie et al.,
    arXiv:2305.13245. The projections to queries, keys and values are one kernel
    [D, G, H/G + 2, K]: for each key-value head its query heads, its key and its value, so that
    splitting G over devices splits all three.

    Args:
      out_std: standard deviation of the output projection's initialisation.
      dropout: rate on the attention probabilities.
      rope: rotates queries and keys by their positions; None where positions are told otherwise.
      first_layer: where this stack's layers begin in the cache, if others come before it.
      out_bias: whether the output projection has a bias; as `use_bias` where not given.
      q_norm, k_norm: normalise each head's queries and keys before they are rotated (Dehghani et
        al., arXiv:2302.05442, section 2).
      window: a token sees so many, itself the last (Mistral, arXiv:2310.06825, section 2).
      window_layers: which layers of the stack have the window; all where not given.
      window_rope: the rotation of those layers; `rope` where not given.
      softcap: bound of the scores (Gemma 2, arXiv:2408.00118, section 2).
      query_scale: factor of the scores in the place of 1/sqrt(K).
      causal: a token sees itself and those before it; if not, all of its segment.
      query_std: standard deviation of the initialisation of the product into queries; `init_std`
        where not given.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dropout: float = 0.0
    init_std: float = 0.02
    out_std: float = 0.02
    use_bias: bool = True
    rope: Rope | None = None
    first_layer: int = 0
    dtype: str = "float32"
    out_bias: bool | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    window_rope: Rope | None = None
    softcap: float | None = None
    query_scale: float | None = None
    causal: bool = True
    query_std: float | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Any = None,
        layer: jax.Array | None = None,
        bias_HTS: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Attends within x, and to what the cache of this layer holds; returns (y_BTD, cache).

        `positions_BT` count from 0, and on from the cache, where they are not given. Segments of
        cached tokens are those of the cache, `segments` [B, S], if it has any. `bias_HTS` is added
        to the scores, S being what the cache has room for, if there is one.
        """
        B, T, _ = x_BTD.shape
        G, R, K = self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim
        qkv_BTGRK = Linear(
            features=(G, R + 2, K),
            axes=("embed", "kv_heads", None, "head_dim"),
            use_bias=self.use_bias,
            init_std=self.init_std,
            dtype=self.dtype,
            kernel_init=self._qkv_init(),
            parts=(
                Part("query", 1, 0, R),
                Part("key", 1, R, R + 1),
                Part("value", 1, R + 1, R + 2),
            ),
            name="qkv",
        )(x_BTD)
        q_BTHK = qkv_BTGRK[:, :, :, :R].reshape(B, T, G * R, K)
        k_BTGK, v_BTGK = qkv_BTGRK[:, :, :, R], qkv_BTGRK[:, :, :, R + 1]
        q_BTHK = shard(q_BTHK, "batch", "length", "act_heads", None)
        if self.q_norm is not None:
            q_BTHK = self.q_norm(q_BTHK)
        if self.k_norm is not None:
            k_BTGK = self.k_norm(k_BTGK)
        window, windowed = self._window(layer)
        if self.rope is not None:
            if positions_BT is None:
                positions_BT = ((0 if cache is None else cache["length"]) + jnp.arange(T))[None]
            turn = self._rotation(self.rope, window, windowed)
            q_BTHK, k_BTGK = turn(q_BTHK, positions_BT), turn(k_BTGK, positions_BT)
        if self.query_scale is not None:
            q_BTHK *= self.query_scale * math.sqrt(K)
        see = partial(
            self.attend,
            causal=self.causal,
            window=window,
            windowed=windowed,
            softcap=self.softcap,
            bias_HTS=bias_HTS,
        )
        if cache is None:
            use_dropout = train and self.dropout > 0
            y_BTHK = see(
                q_BTHK,
                shard(k_BTGK, "batch", "length", "act_kv_heads", None),
                shard(v_BTGK, "batch", "length", "act_kv_heads", None),
                segments_q_BT=segments_BT,
                segments_kv_BS=segments_BT,
                dropout_rate=self.dropout if use_dropout else 0.0,
                dropout_rng=self.make_rng("dropout") if use_dropout else None,
            )
        else:
            assert layer is not None  # a cache holds all layers: which one is this?
            layer, offset = layer + self.first_layer, cache["length"]
            cache = dict(cache)
            for name, new in (("key", k_BTGK), ("value", v_BTGK)):
                rows_LBGSK = cache[name]
                new_1BGTK = jnp.swapaxes(new, 1, 2).astype(rows_LBGSK.dtype)[None]
                start = (layer, 0, 0, offset, 0)
                cache[name] = jax.lax.dynamic_update_slice(rows_LBGSK, new_1BGTK, start)
            k_BSGK, v_BSGK = (
                jnp.swapaxes(jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False), 1, 2)
                for name in ("key", "value")
            )
            segments_BT, segments_BS = None, cache.get("segments")
            if segments_BS is not None:  # rows of unequal prompts: what pads them is another one
                segments_BT = jax.lax.dynamic_slice_in_dim(segments_BS, offset, T, axis=1)
            y_BTHK = see(
                q_BTHK,
                k_BSGK,
                v_BSGK,
                q_offset=offset,
                segments_q_BT=segments_BT,
                segments_kv_BS=segments_BS,
            )
        y_BTD = Linear(
            features=(self.dim,),
            axes=("heads", "head_dim", "embed"),
            in_dims=2,
            use_bias=self.use_bias if self.out_bias is None else self.out_bias,
            init_std=self.out_std,
            dtype=self.dtype,
            name="out",
        )(named(y_BTHK, "attention"))
        return y_BTD, cache

    def attend(
        self, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, **options: Any
    ) -> jax.Array:
        """`ops.attention.attention` of this layer; a method, for `lmjax.adapt` to extend."""
        return attention(q_BTHK, k_BSGK, v_BSGK, dtype=self.dtype, **options)

    def _qkv_init(self) -> nn.initializers.Initializer | None:
        """The initialisation of the kernel [D, G, R + 2, K] where queries start on their own."""
        if self.query_std is None:
            return None
        R = self.num_heads // self.num_kv_heads
        stds = jnp.array([self.query_std] * R + [self.init_std] * 2)
        normal = nn.initializers.normal(1.0)
        return lambda key, shape, dtype: normal(key, shape, dtype) * stds[None, None, :, None]

    def _window(self, layer: jax.Array | None) -> tuple[int | None, jax.Array | None]:
        """(the window, whether it holds in this layer if that differs between layers)."""
        if self.window is None or self.window_layers is None or all(self.window_layers):
            return self.window, None
        if not any(self.window_layers):
            return None, None
        assert layer is not None  # layers differ: which one is this?
        return self.window, jnp.asarray(self.window_layers)[layer]

    def _rotation(
        self, rope: Rope, window: int | None, windowed: jax.Array | None
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The rotation of this layer's queries and keys by their positions."""
        if window is None or self.window_rope is None:
            return partial(rotate, rope=rope)
        if windowed is None:
            return partial(rotate, rope=self.window_rope)
        return partial(rotate, rope=rope, other=self.window_rope, use_other=windowed)

    def init_cache(self, num_layers: int, batch_size: int, length: int) -> dict[str, jax.Array]:
        """Room for `length` tokens of all layers; `length` in it counts those that it holds.

        Keys and values are [L, B, G, S, K]: the tokens of a head lie together, as products over
        them read them, which on a CPU would else copy the whole cache at each token.
        """
        shape = (num_layers, batch_size, self.num_kv_heads, length, self.head_dim)
        dtype = activation_dtype(self.dtype)
        return {
            "key": jnp.zeros(shape, dtype),
            "value": jnp.zeros(shape, dtype),
            "length": jnp.zeros((), jnp.int32),
        }

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass, the mean over a context of `length`: (causal, full).

        Without `causal` both are the full one. In layers with a window the full one counts as many
        keys for each token as the last one sees, and in a stack of unlike layers it is their mean.
        """
        inner = self.num_heads * self.head_dim
        kernels = self.dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        near = min(self.window or length, length)
        layers = self.window_layers or (True,)
        share = sum(layers) / len(layers)  # of layers that have the window
        # Of `length` tokens the first `near` see one more each, and the others `near`.
        seen = near * (near + 1) / 2 + (length - near) * near
        causal = share * seen / length + (1 - share) * (length + 1) / 2
        full = share * near + (1 - share) * length
        if not self.causal:
            causal = full
        return 2.0 * kernels + 4.0 * inner * causal, 2.0 * kernels + 4.0 * inner * full


def residual_std(init_std: float, num_layers: int) -> float:
    """The initialisation of projections into the residual stream: std / sqrt(2 num_layers).

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2),
    section 2.3.
    """
    return init_std / math.sqrt(2 * num_layers)
