"""Find, load and call the compiled kernels."""

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

# What each status code in src/calls.h means.
_STATUS_MESSAGES = {
    1: "the packed buffer is damaged or was made by another version; pack the unit again",
    2: "the packed buffer names a row that it does not have; pack the unit again",
    3: "the sizes of the call do not fit the packed unit",
    4: "there is not enough memory for the kernel's buffers",
    5: "no kernel runs on this CPU",
}
# The argument struct of each function in src/calls.h: all its fields are 8 bytes wide.
_ARGUMENTS = {
    "lego_conv2d": struct.Struct("=21q"),
    "lego_max_pool2d": struct.Struct("=16q"),
    "lego_means": struct.Struct("=5q"),
    "lego_linear": struct.Struct("=9q"),
    "lego_depthwise": struct.Struct("=21q"),
    "lego_run": struct.Struct("=2q"),
    "lego_int8_conv": struct.Struct("=15q"),
    "lego_int8_add": struct.Struct("=19q"),
    "lego_int8_scale": struct.Struct("=16q"),
    "lego_int8_table": struct.Struct("=11q"),
    "lego_int8_copy": struct.Struct("=11q"),
    "lego_int8_max_pool": struct.Struct("=21q"),
    "lego_int8_mean": struct.Struct("=12q"),
    "lego_int8_quantize": struct.Struct("=11q"),
    "lego_int8_dequantize": struct.Struct("=11q"),
    "lego_int8_linear": struct.Struct("=11q"),
}
CallListener = Callable[[str, Sequence[Tensor | None], Sequence[int]], None]
# `call` reports each call that succeeds to this listener, which `tape.recording` sets.
LISTENER: ContextVar[CallListener | None] = ContextVar("LISTENER", default=None)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Load the library.

    Returns:
        The library and the name of its instruction set, or None and the reason why it cannot be
        used.
    """
    folder = Path(__file__).parent
    files = sorted(p for p in folder.glob("_lego.*") if p.suffix in (".so", ".dylib", ".pyd"))
    if not files:
        return None, (
            "legocompress was installed without its compiled kernels; install it again where a "
            "C++17 compiler (g++ or clang++) is available"
        )
    try:
        library = ctypes.CDLL(str(files[0]))
        library.lego_isa.restype = ctypes.c_char_p
        library.lego_isa.argtypes = []
        library.lego_int8_isa.restype = ctypes.c_char_p
        library.lego_int8_isa.argtypes = [ctypes.c_int64]
        library.lego_int8_runs.restype = ctypes.c_int64
        library.lego_int8_runs.argtypes = [ctypes.c_int64]
        for name in _ARGUMENTS:
            function = getattr(library, name)
            function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    except (OSError, AttributeError) as error:
        return None, f"the compiled kernels cannot be loaded: {error}"
    isa = library.lego_isa()
    if isa is None:
        requested = os.environ.get("LEGOCOMPRESS_ISA", "")
        return None, (
            f"LEGOCOMPRESS_ISA={requested} is not an instruction set that both this build and "
            "this CPU have; unset it, or set it to portable"
        )
    return library, isa.decode()


def available() -> bool:
    """Whether the compiled kernels are installed and run on this CPU."""
    return _load()[0] is not None


def why_unavailable() -> str | None:
    """Why the compiled kernels cannot be used, in one sentence; None if they can."""
    library, text = _load()
    return text if library is None else None


def isa() -> str:
    """The instruction set of the float kernels in use: 'avx512', 'avx2', 'neon' or 'portable'.

    Raises:
        KernelError: there are no compiled kernels.
    """
    library, text = _load()
    if library is None:
        raise KernelError(text)
    return text


@functools.cache
def int8_isas() -> dict[str, int]:
    """The instruction sets whose int8 kernels run here, the best one first, and their numbers.

    Raises:
        KernelError: there are no compiled kernels.
    """
    library, text = _load()
    if library is None:
        raise KernelError(text)
    names: dict[str, int] = {}
    number = 0
    while (name := library.lego_int8_isa(number)) is not None:
        if library.lego_int8_runs(number):
            names[name.decode()] = number
        number += 1
    return names


@functools.cache
def int8_isa() -> str:
    """The instruction set of the int8 kernels in use: one of `int8_isas()`.

    Raises:
        KernelError: there are no compiled kernels.
    """
    library, text = _load()
    if library is None:
        raise KernelError(text)
    name = library.lego_int8_isa(-1)
    if name is None:
        raise KernelError("no int8 kernels run on this CPU")
    return str(name.decode())


def call(function: str, tensors: Sequence[Tensor | None], *numbers: int) -> None:
    """Call a function of src/calls.h.

    Args:
        function: its name.
        tensors: one tensor per pointer at the start of its struct, in order; None for a null
            pointer.
        numbers: the integer fields that follow, in order.

    Raises:
        KernelError: there are no compiled kernels, or the function returned an error status.
    """
    library, text = _load()
    if library is None:
        raise KernelError(text)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    status = getattr(library, function)(_ARGUMENTS[function].pack(*pointers, *numbers))
    if status:
        message = _STATUS_MESSAGES.get(status, f"status {status}")
        raise KernelError(f"the fused kernel refused the call: {message}")
    listener = LISTENER.get()
    if listener is not None:
        listener(function, tensors, numbers)
