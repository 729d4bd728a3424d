"""Elementwise nonlinearities whose backward keeps one low-precision array."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from lmjax.errors import UserError, did_you_mean

Activation = Literal["sigmoid", "relu", "tanh", "gelu", "swiglu"]

_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def gelu(x: jax.Array, *, dtype: str = "float32") -> jax.Array:
    """Gaussian error linear unit in its tanh form, written as x * sigmoid(2 u(x)).

    Source: Hendrycks & Gimpel, arXiv:1606.08415, section 2; 0.5 (1 + tanh u) = sigmoid(2 u).
    Only x is kept for the backward, rounded to `dtype`; the result has the dtype of x.
    """
    return _gelu(x, jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gelu(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * _gate(x32)).astype(x.dtype)


def _gelu_fwd(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return _gelu(x, dtype), x.astype(dtype)


def _gelu_bwd(dtype: jnp.dtype, x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    x32 = x.astype(jnp.float32)
    gate = _gate(x32)
    slope = _SLOPE * (1 + 3 * _CUBIC * x32 * x32)
    dx = dy.astype(jnp.float32) * (gate + x32 * gate * (1 - gate) * slope)
    return (dx.astype(dy.dtype),)


def _gate(x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(_SLOPE * (x + _CUBIC * x * x * x))


_gelu.defvjp(_gelu_fwd, _gelu_bwd)


def gelu_erf(x: jax.Array, *, dtype: str = "float32") -> jax.Array:
    """Gaussian error linear unit as it is defined, x Phi(x), as BERT has it.

    Source: Hendrycks & Gimpel, arXiv:1606.08415, section 2; Phi(x) = (1 + erf(x / sqrt 2)) / 2.
    Only x is kept for the backward, rounded to `dtype`; the result has the dtype of x.
    """
    return _gelu_erf(x, jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gelu_erf(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _gelu_erf_fwd(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return _gelu_erf(x, dtype), x.astype(dtype)


def _gelu_erf_bwd(dtype: jnp.dtype, x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    x32 = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * x32 * x32) / math.sqrt(2 * math.pi)
    dx = dy.astype(jnp.float32) * (_normal_cdf(x32) + x32 * density)
    return (dx.astype(dy.dtype),)


def _normal_cdf(x: jax.Array) -> jax.Array:
    # erfc(-x / sqrt 2) / 2 would keep the digits of a tiny tail, and takes twice as long on a CPU.
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


_gelu_erf.defvjp(_gelu_erf_fwd, _gelu_erf_bwd)


def swiglu(gate: jax.Array, up: jax.Array, *, dtype: str = "float32") -> jax.Array:
    """silu(gate) * up, silu(x) = x * sigmoid(x).

    Source: Shazeer, arXiv:2002.05202, equation 6. Only gate and up are kept for the backward,
    rounded to `dtype`; the result has the dtype of `up`.
    """
    return _swiglu(gate, up, jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _swiglu(gate: jax.Array, up: jax.Array, dtype: jnp.dtype) -> jax.Array:
    gate32 = gate.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)).astype(up.dtype)


def _swiglu_fwd(
    gate: jax.Array, up: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _swiglu(gate, up, dtype), (gate.astype(dtype), up.astype(dtype))


def _swiglu_bwd(
    dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate, up = (x.astype(jnp.float32) for x in residuals)
    dy32, open_ = dy.astype(jnp.float32), jax.nn.sigmoid(gate)
    dgate = dy32 * up * open_ * (1 + gate * (1 - open_))
    return dgate.astype(dy.dtype), (dy32 * gate * open_).astype(dy.dtype)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def activation(name: Activation) -> Callable[[jax.Array], jax.Array]:
    """The nonlinearity of this name; "swiglu", of the gate alone, is silu: see `layers.dense`.

    GELU is in its tanh form.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"the activation is {name!r}." + did_you_mean(str(name), ACTIVATIONS))
    return ACTIVATIONS[name]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": gelu,
    "swiglu": jax.nn.silu,
}
