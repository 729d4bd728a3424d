"""Recurrences over the length whose backward pass sums the gradient of the weights in one product.

Left to `lax.scan`, the gradient of the recurrent weights is summed token after token, which reads
and writes an array of their size at every one. Here the backward loop passes gradients to earlier
tokens only; the weights' own is a product over all tokens behind it.
"""

# Shape legend: B batch, T length, G gates, H units.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The hidden state first, then what else a cell keeps; each [B, H] in float32.
State = tuple[jax.Array, ...]
# (what the input gives [B, G, H], what the hidden state gives [B, G, H], state) -> state.
Cell = Callable[[jax.Array, jax.Array, State], State]
# (weights, hidden states [..., H]) -> [..., G, H], an affine map.
Product = Callable[[Any, jax.Array], jax.Array]


def lstm_cell(
    input_B4H: jax.Array, recurrent_B4H: jax.Array, state: State, *, forget_bias: float = 0.0
) -> State:
    """One step of long short-term memory: (hidden, cell) -> (hidden, cell).

    Source: Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 9 (1997), with
    the forget gate of Gers et al. (2000) and no peepholes. The gates are in the order of torch:
    input, forget, candidate, output. `forget_bias` is what the forget gate has beside its
    parameter.
    """
    i_BH, f_BH, g_BH, o_BH = jnp.moveaxis(_float32(input_B4H) + _float32(recurrent_B4H), 1, 0)
    _, cell_BH = state
    cell_BH = jax.nn.sigmoid(f_BH + forget_bias) * cell_BH + jax.nn.sigmoid(i_BH) * jnp.tanh(g_BH)
    return jax.nn.sigmoid(o_BH) * jnp.tanh(cell_BH), cell_BH


def gru_cell(input_B3H: jax.Array, recurrent_B3H: jax.Array, state: State) -> State:
    """One step of a gated recurrent unit: (hidden,) -> (hidden,).

    Source: Cho et al., arXiv:1406.1078, section 2.3, in the form of cuDNN and torch, whose reset
    gate acts behind the product. The gates are in the order of torch: reset, update, candidate.
    """
    x_3BH, r_3BH = (jnp.moveaxis(_float32(a), 1, 0) for a in (input_B3H, recurrent_B3H))
    reset_BH, update_BH = jax.nn.sigmoid(x_3BH[:2] + r_3BH[:2])
    new_BH = jnp.tanh(x_3BH[2] + reset_BH * r_3BH[2])
    return ((1 - update_BH) * new_BH + update_BH * state[0],)


def recurrence(
    cell: Cell,
    product: Product,
    weights: Any,
    input_BTGH: jax.Array,
    state: State,
    *,
    keep_BT: jax.Array | None = None,
    mask_BH: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The states after every token, each [B, T, H]: cell(input, product(weights, hidden), state).

    Args:
      weights: a tree; its floating-point leaves get gradients.
      input_BTGH: what the inputs give, for all tokens.
      state: before the first token.
      keep_BT: bool; where it is False the state is zero before the token: a document begins.
      mask_BH: factors on the hidden state where it is multiplied by the weights (the dropout of
        Gal & Ghahramani, arXiv:1512.05287). It has no gradient.
    """
    # Traced here: what changes `product` while it is called (linen's interceptors) is over when the
    # backward pass is traced.
    (B, T), H = input_BTGH.shape[:2], state[0].shape[-1]
    of_one, one = jax.closure_convert(product, weights, jnp.zeros((B, H)))
    of_all, all_ = jax.closure_convert(product, weights, jnp.zeros((B, T, H)))
    given = weights, one, all_

    def product_one(given: Any, hidden_BH: jax.Array) -> jax.Array:
        weights, one, _ = given
        y: jax.Array = of_one(weights, hidden_BH, *one)
        return y

    def product_all(given: Any, hidden_BTH: jax.Array) -> jax.Array:
        weights, _, all_ = given
        y: jax.Array = of_all(weights, hidden_BTH, *all_)
        return y

    def earlier(previous: State, keep_B: jax.Array | None) -> State:
        if keep_B is None:
            return previous
        return tuple(jnp.where(keep_B[:, None], s, 0) for s in previous)

    def masked(hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
        return hidden if mask is None else hidden * mask

    def forward(given: Any, input_TBGH: Any, state: State, keep_TB: Any, mask_BH: Any) -> Any:
        def step(previous: State, xs: Any) -> tuple[State, Any]:
            x_BGH, keep_B = xs
            known = earlier(previous, keep_B)
            r_BGH = product_one(given, masked(known[0], mask_BH))
            new = cell(x_BGH, r_BGH, known)
            return new, (new, known, r_BGH)

        _, (states, known, r_TBGH) = lax.scan(step, state, (input_TBGH, keep_TB))
        return states, (given, input_TBGH, known, r_TBGH, keep_TB, mask_BH)

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return forward(*args)[0]

    def backward(residuals: Any, d_states: Any) -> Any:
        given, input_TBGH, known, r_TBGH, keep_TB, mask_BH = residuals

        def step(d_later: State, xs: Any) -> tuple[State, Any]:
            x_BGH, r_BGH, known, keep_B, d_here = xs
            d_new = tuple(map(jnp.add, d_later, d_here))
            dx_BGH, dr_BGH, d_known = jax.vjp(cell, x_BGH, r_BGH, known)[1](d_new)
            pull = jax.vjp(lambda h: product_one(given, masked(h, mask_BH)), known[0])[1]
            d_known = (d_known[0] + pull(dr_BGH)[0], *d_known[1:])
            return earlier(d_known, keep_B), (dx_BGH, dr_BGH)

        nothing = tuple(jnp.zeros_like(d[0]) for d in d_states)
        xs = (input_TBGH, r_TBGH, known, keep_TB, d_states)
        d_state, (dx_TBGH, dr_TBGH) = lax.scan(step, nothing, xs, reverse=True)
        hidden_BTH = jnp.swapaxes(known[0], 0, 1)
        hidden_BTH = masked(hidden_BTH, None if mask_BH is None else mask_BH[:, None])
        pull = jax.vjp(lambda given: product_all(given, hidden_BTH), given)[1]
        (d_given,) = pull(jnp.swapaxes(dr_TBGH, 0, 1))
        return d_given, dx_TBGH, d_state, None, None

    run.defvjp(forward, backward)
    keep_TB = None if keep_BT is None else keep_BT.T
    states: Any = run(given, jnp.swapaxes(input_BTGH, 0, 1), state, keep_TB, mask_BH)
    return tuple(jnp.swapaxes(s, 0, 1) for s in states)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
