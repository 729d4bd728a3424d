"""Normalisation over the last axis, with fp32 statistics."""

# Shape legend: leading axes are any; D is the last, normalised axis.

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def layer_norm(
    x: jax.Array,
    scale_D: jax.Array,
    bias_D: jax.Array | None,
    *,
    epsilon: float,
    dtype: str = "float32",
) -> jax.Array:
    """Standardises the last axis to mean 0 and variance 1, then scales and shifts it.

    Source: Ba et al., arXiv:1607.06450, equation 4, over features. Statistics are fp32; the
    backward keeps the standardised x in `dtype` and one fp32 number per row. The result has the
    dtype of x.
    """
    out = _standardize(x, epsilon, jnp.dtype(dtype), True) * _row(scale_D, x.ndim)
    if bias_D is not None:
        out = out + _row(bias_D, x.ndim)
    return out.astype(x.dtype)


def rms_norm(
    x: jax.Array, scale_D: jax.Array, *, epsilon: float, dtype: str = "float32"
) -> jax.Array:
    """Divides the last axis by its root mean square, then scales it.

    Source: Zhang & Sennrich, arXiv:1910.07467, equation 4. The statistic is fp32; the backward
    keeps the divided x in `dtype` and one fp32 number per row. The result has the dtype of x.
    """
    out = _standardize(x, epsilon, jnp.dtype(dtype), False) * _row(scale_D, x.ndim)
    return out.astype(x.dtype)


def _row(v_D: jax.Array, ndim: int) -> jax.Array:
    return v_D.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _standardize(x: jax.Array, epsilon: float, dtype: jnp.dtype, centre: bool) -> jax.Array:
    return _standardize_fwd(x, epsilon, dtype, centre)[0]


def _standardize_fwd(
    x: jax.Array, epsilon: float, dtype: jnp.dtype, centre: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True) if centre else x32
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    normal = centred * inverse
    return normal, (normal.astype(dtype), inverse, jnp.zeros((0,), x.dtype))


def _standardize_bwd(
    epsilon: float,
    dtype: jnp.dtype,
    centre: bool,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array]:
    normal, inverse, like_x = residuals
    normal = normal.astype(jnp.float32)
    along = jnp.mean(dy * normal, axis=-1, keepdims=True)
    across = dy - jnp.mean(dy, axis=-1, keepdims=True) if centre else dy
    return ((inverse * (across - normal * along)).astype(like_x.dtype),)


_standardize.defvjp(_standardize_fwd, _standardize_bwd)
