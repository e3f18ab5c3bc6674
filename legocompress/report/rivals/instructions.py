"""Which instructions of this CPU the rivals may use."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from legocompress.report.rivals.form import LeftOut

ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
# The values of these variables that leave bf16 to be emulated.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
X86 = ("x86_64", "amd64", "i386", "i686")


def read_isa_limit() -> str | None:
    """Return the instruction set that the environment limits oneDNN to, or None."""
    values = (os.environ.get(name) for name in ISA_VARIABLES)
    return next((value.upper() for value in values if value), None)


def check_bf16() -> None:
    """Raise LeftOut if this CPU computes bf16 only by emulation."""
    limit = read_isa_limit()
    if limit in WITHOUT_BF16:
        raise LeftOut(f"not available under {ISA_VARIABLES[0]}={limit}: no bf16")
    cpu: Any = torch.cpu
    if _is_x86():
        available = cpu._is_avx512_bf16_supported()
    else:
        available = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not available:
        raise LeftOut("not available on this CPU: no bf16")


def needs_reduced_range() -> bool:
    """Whether products of u8 and s8 saturate in pairs on this CPU: x86 without VNNI."""
    cpu: Any = torch.cpu
    return _is_x86() and not cpu._is_vnni_supported()


def describe_isa_limit() -> str | None:
    """Return a sentence on what the environment limits, or None."""
    limit = read_isa_limit()
    if limit is None:
        return None
    return (
        f"oneDNN is limited to {limit}, in PyTorch and in OpenVINO (but not OpenVINO's own "
        "kernels, such as pooling); ONNX Runtime has no such limit, and LEGOCOMPRESS_ISA limits "
        "the kernels of this package"
    )


def _is_x86() -> bool:
    return platform.machine().lower() in X86
