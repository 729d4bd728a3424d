"""Recurrent layers: long short-term memory and gated recurrent units, over whole sequences.

B batch, T length, D inputs, G gates, H units.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope

from lmjax import sharding
from lmjax.errors import UserError, did_you_mean
from lmjax.layers.linear import Linear
from lmjax.ops.dropout import dropout_mask
from lmjax.ops.matmul import activation_dtype, travelling_dtype
from lmjax.ops.recurrent import Cell, Product, State, gru_cell, lstm_cell, recurrence
from lmjax.ops.spread import complete
from lmjax.sharding import shard

Kind = Literal["lstm", "gru"]
DropoutKind = Literal["plain", "variational"]


class Recurrent(nn.Module):
    """A recurrent layer: the states of `units` cells at every token, from the tokens up to it.

    The product of the inputs is made for all tokens at once (`input`), that of the hidden state
    token by token (`recurrent`); both are `Linear`. See `ops.recurrent` for the cells: gates stand
    in the order of torch, [D, 4, H] of an LSTM (input, forget, candidate, output), [D, 3, H] of a
    GRU (reset, update, candidate). An LSTM has one bias where torch adds two; a GRU has both, as
    the second is not added to the first.

    On a mesh, rows are split as everywhere, and the weights are kept split over `fsdp` and made
    whole once, before the loop. The devices of `tensor` and `context` hold copies: they do not make
    it faster.

    | parameter | initialisation |
    |---|---|
    | input kernel | Glorot, uniform, for each gate |
    | recurrent kernel | orthogonal, for each gate |
    | biases | 0; a forget gate has `forget_bias` beside its own |

    Args:
      units: how many cells there are.
      kind: "lstm" or "gru".
      forget_bias: what the forget gate of an LSTM has beside its parameter: 1 keeps what it has
        seen from the start (Gers et al., 2000; Jozefowicz et al., ICML 2015). torch has 0.
      dropout: rate on the hidden state where it is multiplied by the recurrent kernel, in training:
        one mask a row and call, for all tokens and gates (Gal & Ghahramani, arXiv:1512.05287,
        equation 7).
      dtype: of the products' operands; states and gates are float32.
    """

    units: int
    kind: Kind = "lstm"
    forget_bias: float = 1.0
    dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses kinds that there are none of."""
        if self.kind not in get_args(Kind):
            raise UserError(f"kind is {self.kind!r}." + did_you_mean(self.kind, get_args(Kind)))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        state: State | None = None,
        keep_BT: jax.Array | None = None,
        end: jax.Array | int | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, State]:
        """Returns (hidden_BTH, the state after token `end` - 1, by default the last one).

        Args:
          state: before the first token, as returned; zero where not given.
          keep_BT: False where a token sees nothing before it (`keep_within`).
        """
        B, T, _ = x_BTD.shape
        H, G, is_lstm = self.units, self.num_gates, self.kind == "lstm"
        cell: Cell = partial(lstm_cell, forget_bias=self.forget_bias) if is_lstm else gru_cell
        if state is None:
            state = self.zeros(B)
        state = tuple(shard(s, "batch", None) for s in state)
        linear = partial(Linear, features=(G, H), axes=("embed", None, None), dtype=self.dtype)
        input_BTGH = linear(kernel_init=_by_gate(nn.initializers.glorot_uniform()), name="input")(
            x_BTD
        )
        recurrent = linear(
            use_bias=not is_lstm,
            kernel_init=_by_gate(nn.initializers.orthogonal()),
            name="recurrent",
        )
        mask_BH = None
        if train and self.dropout:
            kept, scale = dropout_mask(self.make_rng("dropout"), (B, H), self.dropout)
            mask_BH = shard(kept * jnp.float32(scale), "batch", None)
        product, weights = _repeated(recurrent, state[0])
        states = recurrence(
            cell,
            product,
            weights,
            shard(input_BTGH, "batch", None, None, None),
            state,
            keep_BT=keep_BT,
            mask_BH=mask_BH,
        )
        last = T - 1 if end is None else end - 1
        after = tuple(jax.lax.dynamic_index_in_dim(s, last, 1, keepdims=False) for s in states)
        hidden_BTH = states[0].astype(activation_dtype(self.dtype))
        return shard(hidden_BTH, "batch", "residual", "act_embed"), after

    @property
    def num_gates(self) -> int:
        """Gates of a cell, the candidate among them."""
        return 4 if self.kind == "lstm" else 3

    def zeros(self, batch_size: int) -> State:
        """The state before any token: the hidden state, and an LSTM's cell."""
        return (jnp.zeros((batch_size, self.units)),) * (2 if self.kind == "lstm" else 1)

    def flop_per_token(self, dim: int) -> float:
        """FLOP of one token's forward pass, from `dim` inputs."""
        return 2.0 * self.num_gates * self.units * (dim + self.units)


def keep_within(segments_BT: jax.Array | None) -> jax.Array | None:
    """False where a document begins in a row, but at its first token, [B, T]; None without any."""
    if segments_BT is None:
        return None
    same_Bt = segments_BT[:, 1:] == segments_BT[:, :-1]
    return jnp.pad(same_Bt, ((0, 0), (1, 0)), constant_values=True)


class SharedDropout(nn.Module):
    """Dropout with one mask for all tokens of a row: that of the inputs of a variational RNN.

    Source: Gal & Ghahramani, arXiv:1512.05287, equation 7. Another mask comes with every call, so
    that of a text that is read in parts each part has its own.
    """

    rate: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, train: bool) -> jax.Array:
        """Shapes: [B, T, D] -> [B, T, D]."""
        if not train or self.rate == 0:
            return x_BTD
        B, _, D = x_BTD.shape
        kept_B1D, scale = dropout_mask(self.make_rng("dropout"), (B, 1, D), self.rate)
        return jnp.where(kept_B1D, x_BTD * scale, jnp.zeros_like(x_BTD))


class WordDropout(nn.Module):
    """Dropout of rows of an embedding: a token that is dropped is zero wherever it stands in a row.

    Source: Gal & Ghahramani, arXiv:1512.05287, section 4.2.
    """

    rate: float
    vocab_size: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array, *, train: bool) -> jax.Array:
        """Shapes: [B, T, D], [B, T] -> [B, T, D]."""
        if not train or self.rate == 0:
            return x_BTD
        shape = (x_BTD.shape[0], self.vocab_size)
        kept_BV, scale = dropout_mask(self.make_rng("dropout"), shape, self.rate)
        kept_BT = jnp.take_along_axis(shard(kept_BV, "batch", None), tokens_BT, axis=1, mode="clip")
        return jnp.where(kept_BT[..., None], x_BTD * scale, jnp.zeros_like(x_BTD))


def _by_gate(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
    """An initialiser of [D, G, H] that gives every gate a matrix of its own."""

    def make(rng: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        D, G, H = shape
        one = partial(init, shape=(D, H), dtype=dtype)
        return jnp.stack([one(key) for key in jax.random.split(rng, G)], axis=1)

    return make


def _repeated(linear: Linear, x_BH: jax.Array) -> tuple[Product, Any]:
    """(product, weights): `linear` as a function of its variables, which a loop calls many times.

    The kernel is whole before the loop, where `linear` would gather it at each call. What
    intercepts calls of `linear` finds its variables and its path in them.
    """
    if linear.is_initializing():
        linear(x_BH)
    template, path = linear.unbind()[0], linear.path
    variables = dict(sharding.unbox(linear.variables))
    axes = linear.axes
    if sharding.split():
        gather = partial(
            complete, name="embed", axis=axes.index("embed"), dtype=travelling_dtype(linear.dtype)
        )
        kernel = sharding.per_device(gather, (axes,), (None,) * len(axes))(
            variables["params"]["kernel"]
        )
        variables["params"] = {**variables["params"], "kernel": kernel}

    def product(variables: Any, x: jax.Array) -> jax.Array:
        scope = Scope(variables, name=path[-1], path=path)
        copy = template.clone(parent=scope, name=path[-1], axes=(None,) * len(axes))
        y: jax.Array = copy(x)
        return y

    return product, variables
