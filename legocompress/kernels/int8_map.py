"""Maps of uint8 in the layout that the int8 kernels read (src/int8.h), and conversions of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.library import int8_isas

# Equal to the constants in src/int8.h.
SLACK = 1024  # bytes before and after all planes
MAX_BORDER = 64

Sizes = tuple[int, int, int, int]

_FORCED_ISA: ContextVar[int] = ContextVar("_FORCED_ISA", default=0)


@contextmanager
def use_int8_isa(name: str) -> Iterator[None]:
    """Make int8 kernels that are packed and called in this context those of an instruction set.

    Args:
        name: one of `library.int8_isas()`.

    Raises:
        KernelError: this CPU or this build does not have it.
    """
    isas = int8_isas()
    if name not in isas:
        raise KernelError(
            f"the int8 kernels of {name!r} do not run here; those of {', '.join(isas)} do"
        )
    token = _FORCED_ISA.set(isas[name] + 1)
    try:
        yield
    finally:
        _FORCED_ISA.reset(token)


def isa_code() -> int:
    """The field `isa` of a call: 0 for the best kernels, or the number of other ones plus 1."""
    return _FORCED_ISA.get()


@dataclass(frozen=True)
class IntegerMap:
    """A map of uint8, which stands for scale * (value - zero).

    Attributes:
        data: uint8, of `count_bytes(shape, border)` elements, in the layout of src/int8.h.
        shape: sizes (N, C, H, W).
        border: pixels around each map, which hold the zero point.
        zero: the zero point.
    """

    data: Tensor
    shape: Sizes
    border: int
    zero: int


def count_plane_pixels(height: int, width: int, border: int) -> int:
    """Pixels of a plane: rows of width + border pixels, rounded up to an odd multiple of 16."""
    pixels = (height + 2 * border) * (width + border) + border
    return (-(-pixels // 16) | 1) * 16


def count_bytes(shape: Sizes, border: int) -> int:
    """Bytes of the buffer of a map, with the slack before and after its planes."""
    batch, channels, height, width = shape
    quads = -(-channels // 4)
    return 2 * SLACK + 4 * batch * quads * count_plane_pixels(height, width, border)


def empty_map(shape: Sizes, border: int, zero: int) -> IntegerMap:
    """A map that a kernel is about to write.

    Raises:
        KernelError: a size below 1, or a border or zero point that no map has.
    """
    if min(shape) < 1 or not 0 <= border <= MAX_BORDER or not 0 <= zero <= 255:
        raise KernelError(
            f"a map of {shape} with border {border} and zero point {zero} cannot be; sizes are at "
            f"least 1, a border is 0 to {MAX_BORDER}, a zero point 0 to 255"
        )
    return IntegerMap(
        torch.empty(count_bytes(shape, border), dtype=torch.uint8), shape, border, zero
    )


def _view_pixels(data: Tensor, shape: Sizes, border: int) -> Tensor:
    """The real pixels of a map's buffer as a strided view (N, quads, H, W, 4)."""
    batch, channels, height, width = shape
    quads, plane = -(-channels // 4), count_plane_pixels(height, width, border)
    pitch = width + border
    strides = (quads * plane * 4, plane * 4, pitch * 4, 4, 1)
    first = data.storage_offset() + SLACK + 4 * (border * pitch + border)
    return data.as_strided((batch, quads, height, width, 4), strides, first)


def lay_out_map(values: Tensor, border: int, zero: int) -> IntegerMap:
    """The map of plain uint8 values (N, C, H, W); by PyTorch, for tests and constants."""
    shape = (values.shape[0], values.shape[1], values.shape[2], values.shape[3])
    result = empty_map(shape, border, zero)
    result.data.fill_(zero)
    quads = torch.full((shape[0], -(-shape[1] // 4) * 4, *shape[2:]), zero, dtype=torch.uint8)
    quads[:, : shape[1]] = values
    view = _view_pixels(result.data, shape, border)
    view.copy_(quads.reshape(shape[0], -1, 4, *shape[2:]).permute(0, 1, 3, 4, 2))
    return result


def read_map(x: IntegerMap) -> Tensor:
    """The plain uint8 values (N, C, H, W) of a map; by PyTorch, for tests."""
    view = _view_pixels(x.data, x.shape, x.border).permute(0, 1, 4, 2, 3)
    return view.reshape(x.shape[0], -1, *x.shape[2:])[:, : x.shape[1]].contiguous()


def check_map(name: str, x: IntegerMap, shape: Sequence[int] | None = None) -> None:
    """Raise KernelError unless a map's buffer has its size, and the map has this shape."""
    data = x.data
    if data.dtype != torch.uint8 or data.is_cuda or not data.is_contiguous():
        raise KernelError(f"the buffer of {name} is not a contiguous uint8 tensor on the CPU")
    if data.numel() != count_bytes(x.shape, x.border):
        raise KernelError(
            f"the buffer of {name} has {data.numel()} bytes; a map of {x.shape} with border "
            f"{x.border} has {count_bytes(x.shape, x.border)}"
        )
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise KernelError(f"{name} is {tuple(x.shape)}; it must be {tuple(shape)} here")
