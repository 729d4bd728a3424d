"""What chips can do, from their makers' data sheets. A device that is not listed is unknown, not guessed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peaks of one device as jax counts devices.

    Args:
      flop_per_s: dense (not sparse) bf16 matrix products with fp32 accumulation.
      hbm_bytes: memory capacity.
      hbm_bytes_per_s: memory bandwidth.
      source: where the numbers stand.
    """

    flop_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    source: str


def _chip(tflop_per_s: float, gb: float, gb_per_s: float, source: str) -> Chip:
    return Chip(
        flop_per_s=tflop_per_s * 1e12,
        hbm_bytes=gb * 1e9,
        hbm_bytes_per_s=gb_per_s * 1e9,
        source=source,
    )


# The keys are `jax.Device.device_kind`.
CHIPS = {
    "TPU v4": _chip(275, 34, 1228, "Google Cloud TPU v4 documentation; arXiv:2304.01433, table 4"),
    "TPU v5 lite": _chip(197, 17, 819, "Google Cloud TPU v5e documentation"),
    "TPU v5e": _chip(197, 17, 819, "Google Cloud TPU v5e documentation"),
    "TPU v5": _chip(459, 103, 2765, "Google Cloud TPU v5p documentation"),
    "TPU v5p": _chip(459, 103, 2765, "Google Cloud TPU v5p documentation"),
    "TPU v6 lite": _chip(918, 34, 1640, "Google Cloud TPU v6e documentation"),
    "TPU v6e": _chip(918, 34, 1640, "Google Cloud TPU v6e documentation"),
    "NVIDIA A100-SXM4-40GB": _chip(312, 40, 1555, "NVIDIA A100 data sheet"),
    "NVIDIA A100-SXM4-80GB": _chip(312, 80, 2039, "NVIDIA A100 data sheet"),
    "NVIDIA A100 80GB PCIe": _chip(312, 80, 1935, "NVIDIA A100 data sheet"),
    "NVIDIA H100 80GB HBM3": _chip(989.4, 80, 3350, "NVIDIA H100 data sheet, SXM, without sparsity"),
    "NVIDIA H100 PCIe": _chip(756, 80, 2000, "NVIDIA H100 data sheet, PCIe, without sparsity"),
    "NVIDIA H200": _chip(989.4, 141, 4800, "NVIDIA H200 data sheet, SXM, without sparsity"),
}


def chip(device_kind: str) -> Chip | None:
    """The listed chip of this kind, or None."""
    return CHIPS.get(device_kind)
