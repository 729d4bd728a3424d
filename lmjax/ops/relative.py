"""Biases of attention by how far a key lies from its query."""

# Shape legend: H heads, N buckets, T queries, S keys, R = T + S - 1 distances between them.

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def relative_bias(
    table_NH: jax.Array,
    num_queries: int,
    num_keys: int,
    *,
    offset: jax.Array | int = 0,
    max_distance: int,
    both_ways: bool,
) -> jax.Array:
    """What each head adds to the score of query t and key s, bias_HTS: table[bucket(s - t)].

    Source: Raffel et al. (T5), arXiv:1910.10683, section 2.1. Buckets are those of `bucket`; with
    `both_ways` the later half of the table is for keys after their query, else those have the
    bucket of distance 0. Distances are turned into biases once each and then laid out along
    diagonals, so that no array of T x S is gathered, or scattered in the backward pass.

    Args:
      offset: index among the keys of the first query.
      max_distance: from there on all distances share one bucket.
    """
    N, H = table_NH.shape
    T, S = num_queries, num_keys
    distance_R = jnp.arange(T + S - 1) - (T - 1) - jnp.asarray(offset, jnp.int32)
    size = N // 2 if both_ways else N
    by_distance = jnp.asarray(buckets(size, max_distance))
    behind_R = jnp.abs(distance_R) if both_ways else jnp.maximum(-distance_R, 0)
    bucket_R = jnp.take(by_distance, jnp.minimum(behind_R, max_distance))
    if both_ways:
        bucket_R += size * (distance_R > 0)
    values_HR = jnp.take(table_NH.astype(jnp.float32), bucket_R, axis=0).T
    # Rows of length R + 1, one after another, cut into rows of length R: each begins one later.
    rows_HTR = jnp.broadcast_to(jnp.pad(values_HR, ((0, 0), (0, 1)))[:, None], (H, T, T + S))
    skewed_HTR = rows_HTR.reshape(H, -1)[:, : T * (T + S - 1)].reshape(H, T, T + S - 1)
    return skewed_HTR[:, :, T - 1 :]


@functools.cache
def buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0..max_distance, int32: half of them one wide, then log-spaced.

    Source: Raffel et al., arXiv:1910.10683, section 2.1, and its code: with E = num_buckets // 2,
    distances d < E have bucket d, others E + floor(log(d / E) / log(max_distance / E) *
    (num_buckets - E)), at most num_buckets - 1. Exact: in integers, where a float may fall short of
    a boundary.
    """
    exact, found = num_buckets // 2, []
    steps = num_buckets - exact
    for distance in range(max_distance + 1):
        if distance < exact:
            found.append(distance)
            continue
        # step <= log(d/E) / log(M/E) * steps, that is (M/E)^step <= (d/E)^steps
        step = 0
        while step + 1 < steps and (
            max_distance ** (step + 1) * exact**steps <= distance**steps * exact ** (step + 1)
        ):
            step += 1
        found.append(exact + step)
    return np.asarray(found, np.int32)
