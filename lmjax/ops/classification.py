"""Losses of class scores: one class of several (softmax), or each for itself (sigmoid)."""

# B batch, C classes.

from __future__ import annotations

import jax
import jax.numpy as jnp


def softmax_cross_entropy(
    values_BC: jax.Array,
    labels_B: jax.Array,
    *,
    weights_C: jax.Array | None = None,
    smoothing: float = 0.0,
) -> jax.Array:
    """-log softmax(values)[label] of each row in nats, [B], float32.

    Source: smoothing e is Szegedy et al., arXiv:1512.00567, section 7: the target is 1 - e on the
    label and e / C spread over all classes. With `weights_C` every class's part of the target is
    multiplied by the class's weight, as in torch's CrossEntropyLoss; the mean of a batch then
    divides by the sum of the labels' weights.
    """
    values_BC = values_BC.astype(jnp.float32)
    logs_BC = values_BC - jax.nn.logsumexp(values_BC, axis=-1, keepdims=True)
    classes = values_BC.shape[-1]
    target_BC = jax.nn.one_hot(labels_B, classes, dtype=jnp.float32)
    if smoothing:
        target_BC = (1 - smoothing) * target_BC + smoothing / classes
    if weights_C is not None:
        target_BC *= weights_C[None]
    return -jnp.sum(target_BC * logs_BC, axis=-1)


def sigmoid_cross_entropy(
    values_BC: jax.Array,
    labels_BC: jax.Array,
    *,
    weights_C: jax.Array | None = None,
    smoothing: float = 0.0,
) -> jax.Array:
    """-log of the probability that sigmoid(values) gives each label of 0 or 1, [B, C], float32.

    With smoothing e a label y is y (1 - e) + e / 2. `weights_C` multiplies what a label of 1 costs,
    as `pos_weight` in torch's BCEWithLogitsLoss.
    """
    values_BC, labels_BC = values_BC.astype(jnp.float32), labels_BC.astype(jnp.float32)
    if smoothing:
        labels_BC = labels_BC * (1 - smoothing) + smoothing / 2
    if weights_C is None:
        return jax.nn.softplus(values_BC) - labels_BC * values_BC
    yes_BC = labels_BC * weights_C[None] * jax.nn.softplus(-values_BC)
    return yes_BC + (1 - labels_BC) * jax.nn.softplus(values_BC)
