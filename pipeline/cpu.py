"""Facts about this CPU that decide by which numbers and kernels a network is computed right, or soon."""

import platform

import torch


def has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def has_bfloat16() -> bool:
    """Whether bfloat16 is computed as such; else every step goes through float32, which takes ten times as long."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def saturates() -> bool:
    """Whether sums of two products of int8 numbers are kept in 16 bits, and cut off where they do not fit.

    x86 does so without VNNI (vpmaddubsw). Weights of 7 bits always fit.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return not (torch.cpu._is_vnni_supported() or told.get("avx_vnni"))
