"""What chips can do, from their makers' data sheets. One that is not listed is not guessed."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peaks of one device as jax counts devices.

    Args:
      flop_per_s: dense (not sparse) bf16 matrix products with fp32 accumulation.
      hbm_bytes: memory capacity.
      hbm_bytes_per_s: memory bandwidth.
      source: where the numbers stand.
      program_bytes: what a program may use of the memory; 0 where that is not known.
      link_bytes_per_s: one direction of the fast network: of one of the links to a neighbour in a
        TPU's torus, of all links together to the other GPUs of a node; 0 where not known.
      slow_bytes_per_s: one direction of the network between slices or nodes; 0 where not known.
    """

    flop_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    source: str
    program_bytes: float = 0.0
    link_bytes_per_s: float = 0.0
    slow_bytes_per_s: float = 0.0


def _chip(
    tflop_per_s: float,
    gb: float,
    gb_per_s: float,
    source: str,
    *,
    program_gib: float = 0.0,
    link_gb_per_s: float = 0.0,
    slow_gb_per_s: float = 0.0,
) -> Chip:
    return Chip(
        flop_per_s=tflop_per_s * 1e12,
        hbm_bytes=gb * 1e9,
        hbm_bytes_per_s=gb_per_s * 1e9,
        source=source,
        program_bytes=program_gib * 2**30,
        link_bytes_per_s=link_gb_per_s * 1e9,
        slow_bytes_per_s=slow_gb_per_s * 1e9,
    )


# What libtpu 0.0.42 lets a program use is the limit in its refusals. The makers' documents say
# the fast network's bandwidth per chip, both directions of its 4 (2-D torus) or 6 links (3-D)
# together, which is divided here.
_V4 = _chip(
    275,
    34,
    1228,
    "Google Cloud TPU v4 documentation; arXiv:2304.01433, table 4 (links of 50 GB/s)",
    program_gib=30.75,
    link_gb_per_s=50,
    slow_gb_per_s=6.25,
)
_V5E = _chip(
    197,
    17,
    819,
    "Google Cloud TPU v5e documentation (400 GB/s a chip; 6.4 Tb/s for 256 between pods)",
    program_gib=15.75,
    link_gb_per_s=50,
    slow_gb_per_s=3.125,
)
_V5P = _chip(
    459,
    103,
    2765,
    "Google Cloud TPU v5p documentation (1200 GB/s a chip; 50 Gb/s between pods)",
    program_gib=95.74,
    link_gb_per_s=100,
    slow_gb_per_s=6.25,
)
_V6E = _chip(
    918,
    34,
    1640,
    "Google Cloud TPU v6e documentation (800 GB/s a chip; 25.6 Tb/s for 256 between pods)",
    program_gib=31.25,
    link_gb_per_s=100,
    slow_gb_per_s=12.5,
)
_TPU7X = _chip(
    1153.5,
    103,
    3690,
    "Google Cloud TPU7x documentation, half a chip: jax counts its two cores as devices "
    "(1200 GB/s a chip; 100 Gb/s between pods)",
    program_gib=94.75,
    link_gb_per_s=50,
    slow_gb_per_s=6.25,
)

# The keys are `jax.Device.device_kind`.
CHIPS = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _TPU7X,
    "NVIDIA A100-SXM4-40GB": _chip(
        312, 40, 1555, "NVIDIA A100 data sheet", link_gb_per_s=300, slow_gb_per_s=25
    ),
    "NVIDIA A100-SXM4-80GB": _chip(
        312, 80, 2039, "NVIDIA A100 data sheet", link_gb_per_s=300, slow_gb_per_s=25
    ),
    "NVIDIA A100 80GB PCIe": _chip(312, 80, 1935, "NVIDIA A100 data sheet"),
    "NVIDIA H100 80GB HBM3": _chip(
        989.4,
        80,
        3350,
        "NVIDIA H100 data sheet, SXM, without sparsity; DGX H100: 400 Gb/s a GPU between nodes",
        link_gb_per_s=450,
        slow_gb_per_s=50,
    ),
    "NVIDIA H100 PCIe": _chip(756, 80, 2000, "NVIDIA H100 data sheet, PCIe, without sparsity"),
    "NVIDIA H200": _chip(
        989.4,
        141,
        4800,
        "NVIDIA H200 data sheet, SXM, without sparsity; DGX H200: 400 Gb/s a GPU between nodes",
        link_gb_per_s=450,
        slow_gb_per_s=50,
    ),
}


def chip(device_kind: str) -> Chip | None:
    """The listed chip of this kind, or None."""
    return CHIPS.get(device_kind)


def prepare(*, devices: int = 0) -> None:
    """What every command sets before jax meets a device.

    That is `prepare_cpu`, the number of devices that the CPU shows as (0 for one), and, where none
    is set, a folder in which compiled programs are kept ($LMJAX_CACHE, or ~/.cache/lmjax).
    """
    import jax

    prepare_cpu()
    if devices:
        jax.config.update("jax_num_cpu_devices", devices)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("LMJAX_CACHE", "~/.cache/lmjax")).expanduser() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def prepare_cpu() -> None:
    """Settings that make XLA fast on a CPU; to be called before jax meets a device.

    A step is dispatched when the one before has ended: earlier, it would already hold its
    temporaries beside the other's, and gain nothing, as both run on the same cores.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Has glibc's allocator keep what is freed, in huge pages; does nothing without glibc.

    XLA on a CPU allocates the temporaries of every step anew. By default each large block comes
    from the kernel and goes back to it, which costs a page fault for every 4 KB touched; and Linux
    gives huge pages only to memory that asks for them. The heap is therefore stretched once, and
    its addresses are marked: untouched, they cost nothing.
    Process-wide, and to be called before threads are started; the process then holds on to its
    peak memory.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (OSError, AttributeError):
        return
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(arena_max, 1)
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_size_t
    free.argtypes, free.restype = [ctypes.c_size_t], None
    madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    page, huge_page = os.sysconf("SC_PAGE_SIZE"), 14  # MADV_HUGEPAGE
    size = os.sysconf("SC_PHYS_PAGES") * page // 2
    if block := malloc(size):
        start = -(-block // page) * page
        madvise(start, (block + size - start) // page * page, huge_page)
        free(block)
