"""Transformer blocks and their stack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope

from lmjax import sharding
from lmjax.core import Mean
from lmjax.errors import UserError
from lmjax.layers.attention import Attention
from lmjax.layers.cross_attention import CrossAttention
from lmjax.layers.dropout import Dropout
from lmjax.layers.pipeline import pipelined
from lmjax.layers.remat import Remat, named, rule
from lmjax.sharding import shard

HIDDEN, KEPT = "hidden", "kept"  # the collection of layers' hidden states, and their name in it


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), dropout on both branches.

    With `cross_attention`, x + cross_attention(norm(x), memory) comes between the two: a decoder's
    block, whose memory is what the encoder made of the source. Without `norm_first` it is norm(x +
    attention(x)), then norm(x + mlp(x)), as in Vaswani et al., arXiv:1706.03762, section 3.1, and
    BERT. What a branch adds may be normalised once more (`attention_post_norm`, `mlp_post_norm`),
    as in Gemma 2, arXiv:2408.00118, section 2.

    What lies between the products, norms and residual stream, is split along the length over
    `tensor` too; the products gather and scatter it (Korthikanti et al., arXiv:2205.05198, section
    4.2.2).
    """

    attention_norm: nn.Module
    attention: Attention
    mlp_norm: nn.Module
    mlp: nn.Module
    dropout: float = 0.0
    attention_post_norm: nn.Module | None = None
    mlp_post_norm: nn.Module | None = None
    norm_first: bool = True
    cross_norm: nn.Module | None = None
    cross_attention: CrossAttention | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Any = None,
        layer: jax.Array | None = None,
        memory_BMD: jax.Array | None = None,
        memory_segments_BM: jax.Array | None = None,
        bias_HTS: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any, dict[str, Mean]]:
        """Returns (x_BTD, cache, aux); aux is what the MLP reports beside its output.

        The memory and its segments are for the cross-attention, `bias_HTS` for the scores of the
        other one.
        """
        x_BTD = named(x_BTD, "block")
        before = (lambda norm, x: _split(norm(x))) if self.norm_first else (lambda norm, x: x)
        after = (lambda norm, x: x) if self.norm_first else (lambda norm, x: _split(norm(x)))
        y_BTD, cache = self.attention(
            before(self.attention_norm, x_BTD),
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            cache=cache,
            layer=layer,
            train=train,
            bias_HTS=bias_HTS,
        )
        x_BTD += self._branch(y_BTD, self.attention_post_norm, train)
        x_BTD = after(self.attention_norm, x_BTD)
        if self.cross_attention is not None:
            assert self.cross_norm is not None  # it has one, as every branch
            y_BTD, cache = self.cross_attention(
                before(self.cross_norm, x_BTD),
                memory_BMD=memory_BMD,
                segments_BT=segments_BT,
                memory_segments_BM=memory_segments_BM,
                cache=cache,
                layer=layer,
                train=train,
            )
            x_BTD += self._branch(y_BTD, None, train)
            x_BTD = after(self.cross_norm, x_BTD)
        y_BTD, aux = self.mlp(before(self.mlp_norm, x_BTD))
        x_BTD += self._branch(y_BTD, self.mlp_post_norm, train)
        return _split(after(self.mlp_norm, x_BTD)), cache, aux

    def _branch(self, y_BTD: jax.Array, norm: nn.Module | None, train: bool) -> jax.Array:
        """What a branch adds to the residual stream."""
        y_BTD = _split(y_BTD)
        if norm is not None:
            y_BTD = _split(norm(y_BTD))
        return Dropout(self.dropout)(y_BTD, train=train)

    def flop_per_token(self, length: int) -> tuple[float, float]:
        """FLOP of one token's forward pass: (causal attention, full attention).

        What a cross-attention costs depends on its memory too: see `CrossAttention.flop`.
        """
        causal, full = self.attention.flop_per_token(length)
        return causal + self.mlp.flop_per_token(), full + self.mlp.flop_per_token()


class Stack(nn.Module):
    """`num_layers` blocks of the same shape, their parameters stacked on a leading axis.

    On a mesh with several stages and without a cache they run as a pipeline (`layers.pipeline`),
    unless there is a memory or a bias of scores, which no pipeline takes along: an error.
    The numbers are those of the loop, but for dropout, which draws other masks, and for what the
    MLP's aux measures of a microbatch as a whole.

    Args:
      block: the template; its parameters get the axis `layers` in front.
      remat: what the backward pass computes again: nothing ('none'), all but the products with
        weights ('dots'), all but queries, keys, values and what attention makes of them
        ('attention'), everything inside a block ('full'), or that with the blocks' inputs waiting
        in the host's memory ('offload'); by tensor: `layers.remat.Tensors`.
      unroll: how many layers stand in the body of the loop: 1 compiles fastest, `num_layers` leaves
        no loop and runs fastest. The parameters and the numbers are the same.
    """

    block: nn.Module
    num_layers: int
    remat: Remat = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Any = None,
        memory_BMD: jax.Array | None = None,
        memory_segments_BM: jax.Array | None = None,
        bias_HTS: jax.Array | None = None,
        train: bool = False,
        keep: tuple[int, ...] = (),
    ) -> tuple[jax.Array, Any, dict[str, Mean]]:
        """Returns (x_BTD, cache, aux), the Means of aux added over the layers.

        The memory, its segments and the bias are the same for all layers, see `Block`. What comes
        out of the layers `keep`, in that order, is sown as `KEPT` in `HIDDEN` (`layers.hidden`).
        """
        also = {
            name: x
            for name, x in (
                ("memory_BMD", memory_BMD),
                ("memory_segments_BM", memory_segments_BM),
                ("bias_HTS", bias_HTS),
            )
            if x is not None
        }
        if cache is None and sharding.pipeline().stages > 1 and not self.is_initializing():
            if keep:
                raise UserError(
                    f"the mesh has stage={sharding.pipeline().stages}, and a pipeline gives no "
                    "hidden states of its layers: set stage=1, and split the model by fsdp or "
                    "tensor."
                )
            if also:
                raise UserError(
                    f"the mesh has stage={sharding.pipeline().stages}, and layers with a relative "
                    "position bias or cross-attention do not run as a pipeline: set stage=1, and "
                    "split the model by fsdp or tensor."
                )
            along = {"positions_BT": positions_BT, "segments_BT": segments_BT}
            x_BTD, aux = self._pipelined(x_BTD, along, train)
            return x_BTD, None, aux

        def body(block: Any, carry: Any, layer: jax.Array) -> tuple[Any, dict[str, Mean]]:
            x_BTD, cache = carry
            x_BTD, cache, aux = block(
                x_BTD,
                positions_BT=positions_BT,
                segments_BT=segments_BT,
                cache=cache,
                layer=layer,
                train=train,
                **also,
            )
            return (x_BTD, cache), aux

        policy = rule(self.remat) if cache is None else None
        once: Callable[..., Any] = (
            body if policy is None else nn.remat(body, policy=policy, prevent_cse=False)
        )

        def keeping(block: Any, carry: Any, layer: jax.Array) -> tuple[Any, dict[str, Mean]]:
            # Outside of what is computed again: what is kept would be kept again for each layer.
            carry, kept_KBTD = carry
            carry, aux = once(block, carry, layer)
            return (carry, _with_slot(kept_KBTD, carry[0], slots_L[layer])), aux

        loop: Callable[..., Any] = nn.scan(
            keeping if keep else once,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
            unroll=min(self.unroll, self.num_layers),
            metadata_params={"axis": "layers"},
        )
        layers = jnp.arange(self.num_layers)
        if keep:
            # What no one asks for goes to a slot behind the others.
            slots_L = (
                jnp.full(self.num_layers, len(keep)).at[jnp.array(keep)].set(jnp.arange(len(keep)))
            )
            kept_KBTD = _kept(jnp.zeros((len(keep) + 1, *x_BTD.shape), x_BTD.dtype))
            start = (x_BTD, cache), kept_KBTD
            ((x_BTD, cache), kept_KBTD), aux = loop(self.block, start, layers)
            states = tuple(kept_KBTD[i] for i in range(len(keep)))
            self.sow(HIDDEN, KEPT, states, reduce_fn=lambda _, new: new, init_fn=lambda: ())
        else:
            (x_BTD, cache), aux = loop(self.block, (x_BTD, cache), layers)
        return x_BTD, cache, jax.tree.map(lambda total: jnp.sum(total, axis=0), aux)

    def _pipelined(
        self, x_BTD: jax.Array, along: dict[str, jax.Array | None], train: bool
    ) -> tuple[jax.Array, dict[str, Mean]]:
        template, path = self.block.unbind()[0], self.block.path
        rng = self.make_rng("dropout") if train and self.has_rng("dropout") else None

        def layer(
            params: Any, x: jax.Array, layer: jax.Array, microbatch: jax.Array, along: Any
        ) -> tuple[jax.Array, dict[str, Mean]]:
            rngs = None
            if rng is not None:
                rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(rng, microbatch), layer)}
            # The block as it stands in this module, by path too, on the parameters of one layer.
            scope = Scope({"params": params}, rngs=rngs, name=path[-1], path=path)
            x, _, aux = template.clone(parent=scope)(x, layer=layer, train=train, **along)
            return x, aux

        def axes() -> Any:
            def init(x: jax.Array) -> Any:
                rngs = {"params": jax.random.key(0)}
                scope = Scope({}, rngs=rngs, mutable=True, name=path[-1], path=path)
                template.clone(parent=scope)(x, train=False)
                return scope.mutable_variables()["params"]

            boxed = jax.eval_shape(init, x_BTD)
            return jax.tree.map(
                lambda x: x.axes, boxed, is_leaf=lambda x: isinstance(x, sharding.Boxed)
            )

        policy = rule(self.remat)
        return pipelined(
            layer,
            sharding.unbox(self.variables["params"]["block"]),
            x_BTD,
            {name: x for name, x in along.items() if x is not None},
            num_layers=self.num_layers,
            axes=axes,
            plan=sharding.pipeline(),
            wrap=partial(jax.checkpoint, policy=policy, prevent_cse=False)
            if policy
            else lambda layer: layer,
            unroll=self.unroll,
        )


def _split(x_BTD: jax.Array) -> jax.Array:
    """`x_BTD`, split as the residual stream is."""
    return shard(x_BTD, "batch", "residual", "act_embed")


def _kept(x_KBTD: jax.Array) -> jax.Array:
    """Residual streams, each split as it is."""
    return shard(x_KBTD, None, "batch", "residual", "act_embed")


def _with_slot(kept_KBTD: jax.Array, x_BTD: jax.Array, slot: jax.Array) -> jax.Array:
    """`kept_KBTD` with one of them in the place of another."""
    return _kept(jax.lax.dynamic_update_index_in_dim(kept_KBTD, x_BTD, slot, axis=0))
