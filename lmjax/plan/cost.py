"""Times and money from counts: a roofline per step, chip-hours of the run, Chinchilla's optimum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmjax.plan.collectives import Collective
from lmjax.plan.topology import GPUS_PER_NODE, Topology

TOKENS_PER_PARAMETER = 20.0


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one step; each None where a peak is not known.

    Args:
      compute_s: matrix products as executed, at the peak of all devices.
      hbm_s: main memory traffic at its bandwidth.
      network_s: collectives one after another, each at the bandwidth of the links it can use.
      step_s: the largest of the three, as if all overlapped.
      serial_s: the larger of the first two, and then the third, as if no collective overlapped.
      mfu: the model's FLOP, attention counted causal, over what all peaks could do in `step_s`.
      mfu_full: the same with attention counted in full.
      bound: which of the three `step_s` is.
    """

    compute_s: float | None
    hbm_s: float | None
    network_s: float | None
    step_s: float | None
    serial_s: float | None
    mfu: float | None
    mfu_full: float | None
    bound: str


def roofline(
    topology: Topology,
    *,
    executed_flop: float,
    model_flop: float,
    model_flop_full: float,
    hbm_bytes: float | None,
    network_s: float | None,
) -> Times:
    """The times of one step.

    Args:
      executed_flop: of all devices, what is computed again included.
      model_flop, model_flop_full: of the whole batch, causal and full attention.
      hbm_bytes: traffic of one device; None where nothing was compiled.
      network_s: from `network_seconds`.
    """
    chip, devices = topology.chip, topology.num_devices
    if chip is None:
        nothing: dict[str, Any] = dict.fromkeys(Times.__dataclass_fields__)
        return Times(**{**nothing, "bound": "unknown: the chip's peaks are not listed"})
    compute = executed_flop / devices / chip.flop_per_s
    hbm = None if hbm_bytes is None else hbm_bytes / chip.hbm_bytes_per_s
    bounds = {"compute": compute, "HBM": hbm or 0.0, "network": network_s or 0.0}
    bound = max(bounds, key=lambda name: bounds[name])
    peak = bounds[bound] * devices * chip.flop_per_s
    return Times(
        compute_s=compute,
        hbm_s=hbm,
        network_s=network_s,
        step_s=bounds[bound],
        serial_s=max(compute, hbm or 0.0) + (network_s or 0.0),
        mfu=model_flop / peak,
        mfu_full=model_flop_full / peak,
        bound=bound,
    )


def bandwidth(topology: Topology, devices: Sequence[Any]) -> float | None:
    """Bytes per second that one device can send within a group; None where that is not known.

    On a torus each dimension along which the group extends adds a link, and both directions of it
    where the group fills a closed ring. Between slices, or nodes of GPUs, it is the slow network's.
    """
    chip = topology.chip
    if chip is None or not chip.link_bytes_per_s or topology.platform == "cpu":
        return None
    if topology.platform == "gpu":
        nodes = {device.id // GPUS_PER_NODE for device in devices}
        return chip.link_bytes_per_s if len(nodes) == 1 else chip.slow_bytes_per_s
    if len({getattr(device, "slice_index", 0) or 0 for device in devices}) > 1:
        return chip.slow_bytes_per_s or None
    total = 0.0
    for axis, (size, closed) in enumerate(zip(topology.shape, topology.wrap, strict=True)):
        extent = len({device.coords[axis] for device in devices})
        if extent > 1:
            total += chip.link_bytes_per_s * (2 if closed and extent == size else 1)
    return total or math.inf  # the two cores of one chip


def seconds(topology: Topology, collective: Collective, mesh_devices: Sequence[Any]) -> float:
    """Seconds of all runs of a collective in a step; 0 where the network is not known."""
    rate = bandwidth(topology, [mesh_devices[i] for i in collective.group])
    return collective.sent_bytes / rate if rate else 0.0


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What the whole run takes at the predicted step time.

    Args:
      chinchilla_parameters, chinchilla_tokens: the model and data that the same compute C would
        train best: C = 6 N D with D = 20 N, the rule of thumb of Hoffmann et al.,
        arXiv:2203.15556 (table 3, approaches 1 and 2).
    """

    steps: int
    units: float
    flop: float
    hours: float | None
    days: float | None
    chip_hours: float | None
    money: float | None
    chinchilla_parameters: float
    chinchilla_tokens: float


def run_cost(
    *,
    steps: int,
    units_per_step: float,
    flop_per_step: float,
    step_s: float | None,
    num_chips: int,
    price_per_chip_hour: float,
) -> RunCost:
    """Hours, chip-hours and money of a run, without evaluation, saving and failures."""
    flop = steps * flop_per_step
    hours = None if step_s is None else steps * step_s / 3600
    best = math.sqrt(flop / (6 * TOKENS_PER_PARAMETER))
    return RunCost(
        steps=steps,
        units=steps * units_per_step,
        flop=flop,
        hours=hours,
        days=None if hours is None else hours / 24,
        chip_hours=None if hours is None else hours * num_chips,
        money=None
        if hours is None or not price_per_chip_hour
        else hours * num_chips * price_per_chip_hour,
        chinchilla_parameters=best,
        chinchilla_tokens=TOKENS_PER_PARAMETER * best,
    )
