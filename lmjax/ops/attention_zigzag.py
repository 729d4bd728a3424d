"""Which tokens each device of a ring works on, and how they get there.

Outside, device i of n holds the i-th of n contiguous chunks of the sequence. For a causal mask it
works on halves i and 2n - 1 - i of 2n, so that all have equally much to do.
"""

# Shape legend: B batch, T tokens of a device, P parts of them (2 halves if causal, else 1).

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

RING = "context"


def parts(n: int, causal: bool, x: jax.Array) -> jax.Array:
    """The parts [P, B, T / P, ...] that this device works on, from its chunk [B, T, ...]."""
    if not causal:
        return x[None]
    # First halves (numbers 2 i) go to distinct devices, and so do second halves (2 i + 1).
    halves = jnp.split(x, 2, axis=1)
    even, odd = (
        lax.ppermute(half, RING, [(i, _owner(n, 2 * i + which)) for i in range(n)])
        for which, half in enumerate(halves)
    )
    # Device i holds halves i and 2n - 1 - i: the even one comes first if i is even.
    return _swapped_on_odd_devices(even, odd)


def natural(n: int, causal: bool, x: jax.Array) -> jax.Array:
    """Inverse of `parts`."""
    if not causal:
        return x[0]
    halves = [
        lax.ppermute(half, RING, [(_owner(n, 2 * i + which), i) for i in range(n)])
        for which, half in enumerate(_swapped_on_odd_devices(x[0], x[1]))
    ]
    return jnp.concatenate(halves, axis=1)


def _owner(n: int, half: int) -> int:
    return min(half, 2 * n - 1 - half)


def _swapped_on_odd_devices(x: jax.Array, y: jax.Array) -> jax.Array:
    odd = lax.axis_index(RING) % 2 == 1
    return jnp.stack([jnp.where(odd, y, x), jnp.where(odd, x, y)])


def send(n: int, tree: Any) -> Any:
    """`tree` to the next device of the ring."""
    onward = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, RING, onward), tree)
