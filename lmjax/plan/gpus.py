"""What XLA's compiler must be told of a GPU that is not there.

Sources: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and
the white papers of A100 and H100 (SXM). Names of fields are those that XLA reads.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmjax.hardware import CHIPS

CUDNN = (9, 10, 0)  # the oldest with which jax of this version calls fused attention
_ALL = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "registers_per_block_limit": 65536,
    "registers_per_core_limit": 65536,
    "shared_memory_per_block": 48 * 1024,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
}
_HOPPER = {
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "shared_memory_per_block_optin": 227 * 1024,
    "shared_memory_per_core": 228 * 1024,
    "l2_cache_size": 50 * 2**20,
}
_AMPERE = {
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "shared_memory_per_block_optin": 163 * 1024,
    "shared_memory_per_core": 164 * 1024,
    "l2_cache_size": 40 * 2**20,
}
_CAPABILITY: Mapping[str, tuple[int, int, Mapping[str, float]]] = {
    "a100": (8, 0, _AMPERE),
    "h100": (9, 0, _HOPPER),
    "h200": (9, 0, _HOPPER),
}


def target_config(family: str, device_kind: str) -> str:
    """The description of a GPU as the text of XLA's message `GpuTargetConfigProto`."""
    major, minor, own = _CAPABILITY[family]
    chip = CHIPS[device_kind]
    numbers = {
        **_ALL,
        **own,
        "memory_bandwidth": int(chip.hbm_bytes_per_s),
        "device_memory_size": int(chip.hbm_bytes),
    }
    fields = "\n".join(f"  {name}: {value}" for name, value in numbers.items())
    cudnn = "major: {} minor: {} patch: {}".format(*CUDNN)
    return (
        f'gpu_device_info {{\n  name: "{device_kind}"\n  device_vendor: "NVIDIA Corporation"\n'
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n{fields}\n}}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ {cudnn} }}\n'
        f'device_description_str: "{device_kind}"\n'
    )
