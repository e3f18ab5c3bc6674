"""Quantised layers on the int8 kernels: the functions of lego/integer.py, bit for bit, on maps."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.int8_map import IntegerMap, check_map, empty_map, isa_code
from legocompress.kernels.int8_pack import PackedIntegerConv, PackedIntegerLinear
from legocompress.kernels.library import call

Pair = tuple[int, int]


def convolve_int8(
    x: IntegerMap,
    packed: PackedIntegerConv,
    residual: IntegerMap | None = None,
    out_border: int = 0,
    out_zero: int = 0,
) -> IntegerMap:
    """Compute `lego.integer.convolve` of a packed conv.

    Args:
        x: the input. Any border will do; one as wide as the padding is fastest.
        packed: the conv, packed by `pack_integer_conv`.
        residual: the map to add, with the border `out_border`; None if the conv adds none.
        out_border: border of the output.
        out_zero: zero point of the output.

    Raises:
        KernelError: maps that do not fit the conv, or no compiled kernels.
    """
    check_map("the input", x)
    batch, channels, height, width = x.shape
    if channels != packed.channels or x.zero != packed.x_zero:
        raise KernelError(
            f"the input has {channels} channels and zero point {x.zero}; the conv was packed for "
            f"{packed.channels} and {packed.x_zero}"
        )
    left, right, top, bottom = packed.padding
    room = (
        height + top + bottom - packed.dilation[0] * (packed.kernel[0] - 1) - 1,
        width + left + right - packed.dilation[1] * (packed.kernel[1] - 1) - 1,
    )
    if min(room) < 0:
        raise KernelError(f"an input of {x.shape} leaves no output pixel")
    out = (room[0] // packed.stride[0] + 1, room[1] // packed.stride[1] + 1)
    y = empty_map((batch, packed.n_out, *out), out_border, out_zero)
    if residual is not None:
        check_map("the residual", residual, y.shape)
        if residual.border != out_border:
            raise KernelError(
                f"the residual has border {residual.border}, the output {out_border}; they must be "
                "equal"
            )
    elif packed.has_residual:
        raise KernelError("the conv adds a residual, but there is none")
    tensors = (packed.data, x.data, None if residual is None else residual.data, y.data)
    sizes = (packed.data.numel(), batch, height, width, x.border, *out, out_border, out_zero)
    call("lego_int8_conv", tensors, *sizes, isa_code(), torch.get_num_threads())
    return y


def quantize_int8(x: Tensor, scale: float, zero: int, border: int = 0) -> IntegerMap:
    """Compute `lego.integer.quantize_map` of contiguous float32 maps (N, C, H, W) on the CPU.

    Raises:
        KernelError: another kind of input, or no compiled kernels.
    """
    _check_floats(x)
    y = empty_map((x.shape[0], x.shape[1], x.shape[2], x.shape[3]), border, zero)
    numbers = (*x.shape, border, _float_bits(scale), zero)
    call("lego_int8_quantize", (x, y.data), *numbers, isa_code(), torch.get_num_threads())
    return y


def dequantize_int8(x: IntegerMap, scale: float) -> Tensor:
    """Compute `lego.integer.dequantize_map`: float32 maps (N, C, H, W)."""
    check_map("the input", x)
    y = torch.empty(x.shape, dtype=torch.float32)
    numbers = (*x.shape, x.border, _float_bits(scale), x.zero)
    call("lego_int8_dequantize", (x.data, y), *numbers, isa_code(), torch.get_num_threads())
    return y


def apply_linear_int8(x: IntegerMap, packed: PackedIntegerLinear) -> Tensor:
    """Compute `lego.integer.apply_linear` of a map (N, C, 1, 1) without border: float32 (N, n).

    Raises:
        KernelError: another kind of input, or no compiled kernels.
    """
    check_map("the input", x, (x.shape[0], packed.channels, 1, 1))
    if x.border or x.zero != packed.x_zero:
        raise KernelError(
            f"the input of a quantised linear layer has border {x.border} and zero point {x.zero}; "
            f"it needs 0 and {packed.x_zero}"
        )
    n = len(packed.offsets)
    y = torch.empty((x.shape[0], n), dtype=torch.float32)
    tensors = (packed.weight, packed.offsets, packed.scales, packed.bias, x.data, y)
    sizes = (x.shape[0], packed.channels, n)
    call("lego_int8_linear", tensors, *sizes, isa_code(), torch.get_num_threads())
    return y


def max_pool_int8(
    x: IntegerMap,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair = (1, 1),
    out_border: int = 0,
) -> IntegerMap:
    """Compute the largest value of each window, as `torch.nn.functional.max_pool2d` does.

    Args:
        x: the input. Its scale and zero point are also those of the output.
        kernel: height and width of the window.
        stride: rows and columns.
        padding: rows and columns on each side, at most half of the kernel; they are never largest.
        dilation: rows and columns.
        out_border: border of the output.

    Raises:
        KernelError: a geometry that leaves no pixel, or no compiled kernels.
    """
    check_map("the input", x)
    out = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    if min(out) < 1:
        raise KernelError(f"an input of {x.shape} leaves no output pixel")
    y = empty_map((x.shape[0], x.shape[1], out[0], out[1]), out_border, x.zero)
    sizes = (*x.shape, x.border, *out, out_border, x.zero)
    geometry = (*kernel, *stride, *padding, *dilation)
    numbers = (*sizes, *geometry, isa_code(), torch.get_num_threads())
    call("lego_int8_max_pool", (x.data, y.data), *numbers)
    return y


def average_maps_int8(x: IntegerMap, multiplier: int, zero: int) -> IntegerMap:
    """Compute `lego.integer.average_maps`: maps (N, C, 1, 1) without border."""
    check_map("the input", x)
    y = empty_map((x.shape[0], x.shape[1], 1, 1), 0, zero)
    numbers = (*x.shape, x.border, x.zero, multiplier, zero)
    call("lego_int8_mean", (x.data, y.data), *numbers, isa_code(), torch.get_num_threads())
    return y


def add_maps_int8(
    a: IntegerMap,
    b: IntegerMap,
    multipliers: Pair,
    bias: int,
    out_shift: int,
    out_zero: int,
    low: int = 0,
    high: int = 255,
) -> IntegerMap:
    """Compute `lego.integer.add_maps` of two maps of one shape and border.

    Raises:
        KernelError: maps that do not fit each other, or no compiled kernels.
    """
    _check_alike(a, b)
    y = empty_map(a.shape, a.border, out_zero)
    rest = (a.zero, b.zero, *multipliers, bias, out_shift, low, high)
    numbers = (*a.shape, a.border, out_zero, *rest, isa_code(), torch.get_num_threads())
    call("lego_int8_add", (a.data, b.data, y.data), *numbers)
    return y


def scale_maps_int8(
    x: IntegerMap, gate: IntegerMap, multiplier: int, bias: int, out_shift: int, out_zero: int
) -> IntegerMap:
    """Compute `lego.integer.scale_maps`; the gate is (N, C, 1, 1) without border.

    Raises:
        KernelError: a gate that does not fit, or no compiled kernels.
    """
    check_map("the input", x)
    check_map("the gate", gate, (*x.shape[:2], 1, 1))
    if gate.border:
        raise KernelError(f"the gate has border {gate.border}; it must have none")
    y = empty_map(x.shape, x.border, out_zero)
    rest = (x.zero, gate.zero, multiplier, bias, out_shift)
    numbers = (*x.shape, x.border, out_zero, *rest, isa_code(), torch.get_num_threads())
    call("lego_int8_scale", (x.data, gate.data, y.data), *numbers)
    return y


def look_up_int8(x: IntegerMap, table: Tensor, out_zero: int) -> IntegerMap:
    """Replace each value by that of a table, uint8 (256,)."""
    check_map("the input", x)
    if table.dtype != torch.uint8 or table.shape != (256,) or not table.is_contiguous():
        raise KernelError("a table has 256 values of uint8")
    y = empty_map(x.shape, x.border, out_zero)
    numbers = (*x.shape, x.border, out_zero, isa_code(), torch.get_num_threads())
    call("lego_int8_table", (table, x.data, y.data), *numbers)
    return y


def concatenate_int8(maps: Sequence[IntegerMap]) -> IntegerMap:
    """Join maps of one scale, zero point, border and size along their channels.

    Raises:
        KernelError: no maps, maps that do not fit each other, or no compiled kernels.
    """
    if not maps:
        raise KernelError("there are no maps to concatenate")
    first = maps[0]
    for x in maps:
        _check_alike(x, first, channels=False)
        if x.zero != first.zero:
            raise KernelError(
                f"maps of zero points {first.zero} and {x.zero} cannot be concatenated"
            )
    batch, _, height, width = first.shape
    channels = sum(x.shape[1] for x in maps)
    y = empty_map((batch, channels, height, width), first.border, first.zero)
    at = 0
    for x in maps:
        numbers = (*x.shape, x.border, channels, at, first.zero, torch.get_num_threads())
        call("lego_int8_copy", (x.data, y.data), *numbers)
        at += x.shape[1]
    return y


def _check_alike(a: IntegerMap, b: IntegerMap, channels: bool = True) -> None:
    check_map("the first map", a)
    check_map("the second map", b)
    sizes = [x.shape if channels else (x.shape[0], *x.shape[2:]) for x in (a, b)]
    if sizes[0] != sizes[1] or a.border != b.border:
        raise KernelError(
            f"maps of {a.shape} with border {a.border} and of {b.shape} with border {b.border} do "
            "not fit each other"
        )


def _check_floats(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.is_cuda or x.dim() != 4 or not x.is_contiguous():
        raise KernelError(
            "the quantising kernel needs contiguous float32 maps (N, c, H, W) on the CPU"
        )


def _float_bits(value: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("=I", struct.pack("=f", value))[0])
