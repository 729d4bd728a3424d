"""The collectives that a layout makes necessary, before anything is compiled: rules of thumb."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from lmjax.engine.program import Draft
from lmjax.plan.collectives import Collective, sent

OPERAND_BYTES = 2  # weights, gradients and activations travel in bf16


def expected(draft: Draft, *, units_per_step: float, microbatches: int) -> list[Collective]:
    """Collectives that parameters' shardings ask for; attention over `context` is not among them.

    A parameter split over `fsdp` is gathered for the forward and for the backward pass of each
    microbatch, and its gradient reduce-scattered; over `data` and `slices` its gradient is reduced;
    a product with a weight split over `tensor` gathers or scatters the tokens' vectors, forward and
    backward (Shoeybi et al., arXiv:1909.08053, with the sequence split as in Korthikanti et al.,
    arXiv:2205.05198).
    """
    sizes = dict(draft.mesh.shape)
    ways = math.prod(sizes[a] for a in ("slices", "data", "fsdp", "expert", "context"))
    tokens = units_per_step / ways
    found = []

    def add(kind: str, axis: str, payload: float, times: float, source: str) -> None:
        if sizes[axis] > 1:
            found.append(
                Collective(
                    kind=kind,
                    axes=(axis,),
                    group=_first_group(sizes, axis),
                    payload_bytes=payload,
                    sent_bytes=times * sent(kind, payload, sizes[axis]),
                    times=times,
                    source=source,
                )
            )

    for path, leaf in jax.tree_util.tree_leaves_with_path(draft.abstract_state.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        split = [_axes(part) for part in _padded(leaf)]
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * OPERAND_BYTES
        if any("fsdp" in axes for axes in split):
            add("all-gather", "fsdp", shard, 2 * microbatches, name)
            add("reduce-scatter", "fsdp", shard * sizes["fsdp"], microbatches, name)
        for axis in ("data", "slices"):
            add("all-reduce", axis, shard, 1, name)
        if any("tensor" in axes for axes in split) and len(leaf.shape) > 1:
            layers = leaf.shape[0] if len(leaf.shape) > 2 else 1
            width = max(n for n, a in zip(leaf.shape, split, strict=True) if "tensor" not in a)
            payload = tokens * width * OPERAND_BYTES
            add("reduce-scatter", "tensor", payload, 2 * layers, name)
    return found


def _padded(leaf: Any) -> list[Any]:
    spec = list(leaf.sharding.spec)
    return spec + [None] * (len(leaf.shape) - len(spec))


def _axes(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _first_group(sizes: dict[str, int], axis: str) -> tuple[int, ...]:
    grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    first = tuple(slice(None) if name == axis else 0 for name in sizes)
    return tuple(int(i) for i in np.asarray(grid[first]).reshape(-1))
