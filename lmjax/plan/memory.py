"""Memory of one device by kind: exact for what is kept, the compiler's account for the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from lmjax.engine.program import Draft, Program
from lmjax.plan.flop import largest, scans

PARAMETERS, MOMENTS, OTHER = "parameters", "moments", "batch and other state"
GRADIENTS, ACTIVATIONS, TEMPORARIES = "gradients", "activations", "temporaries"
KINDS = (PARAMETERS, MOMENTS, OTHER, GRADIENTS, ACTIVATIONS, TEMPORARIES)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_per_device(tree: Any) -> float:
    """Bytes of one device's shards of a tree of shapes with shardings, in device memory."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x.dtype)
            for x in jax.tree.leaves(tree)
            if x.sharding.memory_kind not in ("pinned_host", "unpinned_host")
            or x.sharding.mesh.devices.flat[0].platform == "cpu"
        )
    )


def _itemsize(dtype: Any) -> int:
    return getattr(dtype, "itemsize", 4)


def kept(draft: Draft) -> dict[str, float]:
    """Bytes per device that lie there from step to step, and the gradient of what trains."""
    state = draft.abstract_state
    return {
        PARAMETERS: bytes_per_device((state.params, state.frozen)),
        MOMENTS: bytes_per_device(state.opt_state),
        OTHER: bytes_per_device((state.model_state, state.step, dict(draft.abstract_batch))),
        GRADIENTS: bytes_per_device(state.params),
    }


def compiled_bytes(program: Program) -> tuple[float, float]:
    """(what the step is given and keeps, what it needs beside) on one device, by the compiler.

    But for a CPU the second is what the peak leaves: the sum of all temporaries, which the compiler
    gives too, counts some that are never there together.
    """
    state = float(program.memory.get("state and batch", 0))
    temporaries = float(program.memory.get("temporaries", 0))
    analysis = program.compiled.memory_analysis()
    peak = float(getattr(analysis, "peak_memory_in_bytes", 0) or 0)
    if peak and program.mesh.devices.flat[0].platform != "cpu":
        temporaries = min(temporaries, max(peak - state, 0.0))
    return state, temporaries


def by_kind(
    draft: Draft, *, temporary_bytes: float, state_bytes: float, activation_bytes: float
) -> dict[str, float]:
    """Splits the compiler's total over the kinds; the sum of all is that total.

    Args:
      temporary_bytes: what the compiler says the step needs beside its inputs.
      state_bytes: what it says its inputs take, padding included.
      activation_bytes: what the forward loops hand to the backward loops.
    """
    parts = kept(draft)
    gradients = min(parts[GRADIENTS], temporary_bytes)
    activations = min(activation_bytes, temporary_bytes - gradients)
    other = state_bytes - parts[PARAMETERS] - parts[MOMENTS]
    return {
        **parts,
        OTHER: max(other, parts[OTHER]),
        GRADIENTS: gradients,
        ACTIVATIONS: activations,
        TEMPORARIES: temporary_bytes - gradients - activations,
    }


def estimate(draft: Draft) -> dict[str, float]:
    """The kinds before anything is compiled.

    Activations are what the layers' loops stack for the backward pass; temporaries the largest
    array that the step makes, twice. Both are taken to be split over all devices.
    """
    devices = draft.mesh.size
    stacked = sum(
        sum(v.aval.size * _itemsize(v.aval.dtype) for v in scan.outvars[scan.params["num_carry"] :])
        for path, scan in scans(draft.jaxpr)
        if "jvp(" in path and "transpose(" not in path
    )
    biggest = max((size for size, _, _ in largest(draft.jaxpr, 1)), default=0.0)
    return {**kept(draft), ACTIVATIONS: stacked / devices, TEMPORARIES: 2 * biggest / devices}


def refused(message: str) -> tuple[float, float] | None:
    """(bytes asked for, bytes there are) from a compiler's RESOURCE_EXHAUSTED; None from others.

    Says `total memory required for HLO temporaries (112.00G) exceeds available HBM (15.75G)` or
    `Used 23.11G of 15.75G hbm`.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (
        rf"Used {size} of {size} hbm",
        rf"\({size}\) exceeds available HBM \({size}\)",
        rf"[Rr]equires? {size}.*?(?:limit|available|capacity)\D*{size}",
    ):
        if match := re.search(pattern, message):
            asked, there = (float(match[i]) * _UNITS[match[i + 1]] for i in (1, 3))
            return asked, there
    return math.nan, math.nan


def total(parts: Mapping[str, float]) -> float:
    """Bytes of all kinds."""
    return float(sum(parts.values()))
