"""The compiled kernels: finding the library, loading it, and calling it."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path

from torch import Tensor

from legocompress.errors import KernelError

# The status codes in src/calls.h.
_FAULTS = {
    1: "the packed buffer is damaged or was made by another version; pack the unit again",
    2: "the packed buffer names a row that it does not have; pack the unit again",
    3: "the sizes of the call do not fit the packed unit",
    4: "there is not enough memory for the kernel's buffers",
    5: "no kernel runs on this CPU",
}
# The structs of those functions there: so many fields, each of 8 bytes.
_ARGUMENTS = {
    "lego_conv2d": struct.Struct("=21q"),
    "lego_max_pool2d": struct.Struct("=16q"),
    "lego_means": struct.Struct("=5q"),
    "lego_linear": struct.Struct("=9q"),
    "lego_depthwise": struct.Struct("=21q"),
    "lego_run": struct.Struct("=2q"),
}
Note = Callable[[str, Sequence[Tensor | None], Sequence[int]], None]
# Told of each call, where somebody records them.
LISTENER: ContextVar[Note | None] = ContextVar("LISTENER", default=None)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its instruction set, or None and the reason."""
    folder = Path(__file__).parent
    found = sorted(p for p in folder.glob("_lego.*") if p.suffix in (".so", ".dylib", ".pyd"))
    if not found:
        return None, (
            "legocompress was installed without its compiled kernels; install it again where a "
            "C++17 compiler (g++ or clang++) is at hand"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        library.lego_isa.restype = ctypes.c_char_p
        library.lego_isa.argtypes = []
        for name in _ARGUMENTS:
            function = getattr(library, name)
            function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    except (OSError, AttributeError) as error:
        return None, f"the compiled kernels cannot be loaded: {error}"
    isa = library.lego_isa()
    if isa is None:
        asked = os.environ.get("LEGOCOMPRESS_ISA", "")
        return None, (
            f"LEGOCOMPRESS_ISA={asked} names no instruction set that this build and CPU have; "
            "unset it, or set it to portable"
        )
    return library, isa.decode()


def available() -> bool:
    """Whether the compiled kernels are there and this CPU can run them."""
    return _load()[0] is not None


def why_unavailable() -> str | None:
    """Why the compiled kernels cannot be used, in one sentence; None where they can."""
    library, text = _load()
    return text if library is None else None


def isa() -> str:
    """The instruction set of the kernels in use: 'avx512', 'avx2', 'neon' or 'portable'.

    Raises:
        KernelError: there are no compiled kernels.
    """
    library, text = _load()
    if library is None:
        raise KernelError(text)
    return text


def call(function: str, tensors: Sequence[Tensor | None], *numbers: int) -> None:
    """Run a function of src/calls.h on the fields of its struct, in order.

    Args:
        function: its name.
        tensors: that its pointers point to, None for null.
        numbers: the fields after those.

    Raises:
        KernelError: there are no compiled kernels, or they refuse the call.
    """
    library, text = _load()
    if library is None:
        raise KernelError(text)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    status = getattr(library, function)(_ARGUMENTS[function].pack(*pointers, *numbers))
    if status:
        raise KernelError(f"the fused kernel refused: {_FAULTS.get(status, f'status {status}')}")
    listener = LISTENER.get()
    if listener is not None:
        listener(function, tensors, numbers)
