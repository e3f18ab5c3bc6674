"""Pack the integers of a quantised conv or linear layer for the int8 kernels (src/int8.h)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.int8_map import isa_code
from legocompress.kernels.library import int8_isa, int8_isas
from legocompress.lego.integer import IntegerConv, IntegerLinear

# Equal to the constants in src/int8.h.
_MAGIC, _VERSION = 0x3849474C, 1
_HEADER_FIELDS = 36
_PANEL_ROWS, _TILE_ROWS, _TILE_QUADS = 6, 16, 16
MAX_TAPS = 1024
_QUADS, _PAIRS, _TILES, _COLUMNS, _DEPTHWISE = range(5)
_ALIGNMENT = 64  # bytes: a cache line
# Products of a sum of 32 bits: 255 * 127 each, and 2^23 for rounding.
MAX_PRODUCTS = (2**31 - 1 - 2**23) // (255 * 127)


@dataclass(frozen=True)
class PackedIntegerConv:
    """A conv for `convolve_int8`; opaque but for its sizes.

    Attributes:
        data: uint8 on the CPU. It fits the instruction set for which it was packed.
        n_out: output channels.
        channels: input channels of all groups.
        kernel, stride, dilation: rows and columns.
        padding: pixels to the left, to the right, on top and at the bottom.
        x_zero: zero point that the input must have.
        has_residual: whether a map is added.
    """

    data: Tensor
    n_out: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    x_zero: int
    has_residual: bool


@dataclass(frozen=True)
class PackedIntegerLinear:
    """A linear layer for `apply_linear_int8`.

    Attributes:
        weight: int8 (blocks of 16 outputs, quads of inputs, 16, 4).
        offsets: int32 (n,), minus the zero point times the sum of the weights.
        scales, bias: float32 (n,).
        channels: inputs.
        x_zero: zero point that the input must have.
    """

    weight: Tensor
    offsets: Tensor
    scales: Tensor
    bias: Tensor
    channels: int
    x_zero: int


@dataclass
class _Part:
    """The filters of one split: int8 (rows, channels of whole quads, taps)."""

    first_quad: int
    filters: Tensor


def pack_integer_conv(
    conv: IntegerConv,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> PackedIntegerConv:
    """Pack a conv, and check every number of it.

    Each split keeps only the Lego filters that its slots use.

    Args:
        conv: the integers.
        stride: rows and columns.
        padding: pixels to the left, to the right, on top and at the bottom.
        dilation: rows and columns.

    Raises:
        KernelError: a number out of the range that `IntegerConv` states, sizes that do not fit, or
            sums that may not fit 32 bits.
    """
    _check_conv(conv, stride, padding, dilation)
    shape = conv.shape
    parts, row_filters, rows = _split_rows(conv)
    n_quads = -(-shape.n_out // 4)
    sums = torch.cat([part.filters.to(torch.int64).sum((1, 2)) for part in parts])
    shifts = conv.shifts.to("cpu", torch.int64)[row_filters]
    offsets = ((1 << shifts) >> 1) - conv.x_zero * sums
    depthwise = _is_depthwise(conv)
    layout = _DEPTHWISE if depthwise else _choose_layout(parts)
    packed_parts, filters = _pack_filters(parts, layout)
    multipliers = conv.multipliers.to("cpu", torch.int64).permute(1, 0, 2).reshape(shape.n_out, -1)
    missing = 4 * n_quads - shape.n_out
    rest = 4 * n_quads - len(offsets) if depthwise else 0
    sections = {
        "parts": packed_parts,
        "filters": filters,
        "offsets": F.pad(offsets, (0, rest)).to(torch.int32),
        "shifts": F.pad(shifts, (0, rest)).to(torch.int32),
        # Channels that fill the last quad sum the rows of the last channel, times zero.
        "rows": _by_quads(torch.cat([rows, rows[-1:].expand(missing, -1)])).to(torch.int32),
        "multipliers": _by_quads(_twice(F.pad(multipliers, (0, 0, 0, missing)))),
        "bias": _twice(F.pad(conv.bias.to("cpu", torch.int64), (0, missing))),
        "table": torch.zeros(0, dtype=torch.uint8) if conv.table is None else conv.table.cpu(),
    }
    numbers = [
        layout, shape.n_out, shape.groups * shape.channels, *shape.kernel, *stride, *padding,
        *dilation, len(parts), rows.shape[1], len(offsets), int(conv.is_dense), conv.x_zero,
        conv.low, conv.high, conv.out_shift, conv.residual_multiplier, conv.residual_zero,
        int(conv.table is not None),
    ]  # fmt: skip
    return PackedIntegerConv(
        data=_join(numbers, sections),
        n_out=shape.n_out,
        channels=shape.groups * shape.channels,
        kernel=shape.kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        x_zero=conv.x_zero,
        has_residual=conv.residual_multiplier != 0,
    )


def pack_integer_linear(linear: IntegerLinear) -> PackedIntegerLinear:
    """Pack a linear layer.

    Raises:
        KernelError: tensors that do not fit each other, or sums that may not fit 32 bits.
    """
    n, c = linear.weight.shape
    if (
        linear.weight.dtype != torch.int8
        or linear.scales.shape != (n,)
        or linear.bias.shape != (n,)
    ):
        raise KernelError(
            f"a quantised linear layer needs int8 weights (n, c) and n scales and biases, not "
            f"{linear.weight.dtype} {tuple(linear.weight.shape)}, {tuple(linear.scales.shape)} and "
            f"{tuple(linear.bias.shape)}"
        )
    if c > MAX_PRODUCTS or not 0 <= linear.x_zero <= 255:
        raise KernelError(
            f"a quantised linear layer has at most {MAX_PRODUCTS} inputs, not {c}, and a zero "
            f"point of 0 to 255, not {linear.x_zero}"
        )
    weight = linear.weight.cpu()
    padded = F.pad(weight, (0, -c % 4, 0, -n % 16)).reshape(-(-n // 16), 16, -(-c // 4), 4)
    return PackedIntegerLinear(
        weight=padded.transpose(1, 2).contiguous(),
        offsets=(-linear.x_zero * weight.to(torch.int64).sum(1)).to(torch.int32),
        scales=linear.scales.to("cpu", torch.float32).contiguous(),
        bias=linear.bias.to("cpu", torch.float32).contiguous(),
        channels=c,
        x_zero=linear.x_zero,
    )


def _is_depthwise(conv: IntegerConv) -> bool:
    shape = conv.shape
    return conv.is_dense and shape.channels == 1 and shape.groups == shape.n_out


def _split_rows(conv: IntegerConv) -> tuple[list[_Part], Tensor, Tensor]:
    """Number the rows of Z: one per split of a group, and Lego filter that the split uses.

    Returns:
        The parts; the filter of each row; and the rows (n, o * k) that each output channel sums.
    """
    shape = conv.shape
    bank = conv.filters.cpu().flatten(2)
    per_group = shape.n_out // shape.groups
    rows = torch.zeros(shape.n_out, shape.n_split, shape.n_terms, dtype=torch.int64)
    if _is_depthwise(conv):
        every = torch.arange(shape.n_out)
        return [_Part(0, bank)], every, torch.zeros(shape.n_out, 1, dtype=torch.int64)
    parts, used_filters, first_row = [], [], 0
    for group in range(shape.groups):
        outputs = slice(group * per_group, (group + 1) * per_group)
        for i in range(shape.n_split):
            slots = conv.index[i, outputs].cpu()
            used, position = torch.unique(slots, return_inverse=True)
            rows[outputs, i] = position + first_row
            first_row += len(used)
            used_filters.append(used)
            channels = max(0, min(shape.width, shape.channels - i * shape.width))
            first = group * shape.channels + i * shape.width
            parts.append(_cut_part(bank[used], first, channels))
    return parts, torch.cat(used_filters), rows.reshape(shape.n_out, -1)


def _cut_part(filters: Tensor, first: int, channels: int) -> _Part:
    """A part whose channels [first, first + channels) are padded with zeros to whole quads."""
    before, after = first % 4, -(first + channels) % 4
    if channels == 0:  # a split past the last channel: all of its sums are zero
        return _Part(0, torch.zeros(len(filters), 4, filters.shape[2], dtype=torch.int8))
    return _Part(first // 4, F.pad(filters[:, :channels], (0, 0, before, after)))


def _choose_layout(parts: list[_Part]) -> int:
    """The layout that the kernels in use read, and that is fastest for these parts."""
    code = isa_code()
    isa = {n + 1: name for name, n in int8_isas().items()}[code] if code else int8_isa()
    if isa in ("avx2", "avx512"):
        return _PAIRS
    if isa != "amx":
        return _QUADS
    quads = {part.filters.shape[1] // 4 for part in parts}
    taps = parts[0].filters.shape[2]
    if max(quads) * taps <= 4:
        return _QUADS
    n = max(quads)
    blocks = -(-n // _TILE_QUADS)
    direct = len(quads) == 1 and n % blocks == 0 and n // blocks >= 8
    return _TILES if direct else _COLUMNS


def _pack_filters(parts: list[_Part], layout: int) -> tuple[Tensor, Tensor]:
    """The table of parts (n, 4), and all filters as bytes."""
    arrange = {
        _QUADS: _arrange_quads,
        _PAIRS: _arrange_pairs,
        _TILES: _arrange_tiles,
        _COLUMNS: _arrange_columns,
        _DEPTHWISE: _arrange_depthwise,
    }[layout]
    table, pieces, at = [], [], 0
    for part in parts:
        rows, channels, _ = part.filters.shape
        quads = -(-rows // 4) if layout == _DEPTHWISE else channels // 4
        table.append([part.first_quad, quads, rows, at])
        piece = arrange(part.filters).contiguous().view(torch.uint8).flatten()
        piece = F.pad(piece, (0, -len(piece) % _ALIGNMENT))
        pieces.append(piece)
        at += len(piece)
    return torch.tensor(table, dtype=torch.int64), torch.cat(pieces)


def _panels(filters: Tensor) -> list[Tensor]:
    return list(filters.split(_PANEL_ROWS))


def _arrange_quads(filters: Tensor) -> Tensor:
    parts = []
    for panel in _panels(filters):
        rows, channels, taps = panel.shape
        quads = panel.reshape(rows, channels // 4, 4, taps).permute(3, 1, 0, 2)
        parts.append(quads.flatten())
    return torch.cat(parts)


def _arrange_pairs(filters: Tensor) -> Tensor:
    parts = []
    for panel in _panels(filters):
        rows, channels, taps = panel.shape
        # (rows, quads, pair member, parity, taps) to (taps, quads, parity, rows, member)
        pairs = panel.reshape(rows, channels // 4, 2, 2, taps).permute(4, 1, 3, 0, 2)
        parts.append(pairs.to(torch.int16).flatten())
    return torch.cat(parts)


def _arrange_tiles(filters: Tensor) -> Tensor:
    rows, channels, taps = filters.shape
    blocks = -(-channels // 4 // _TILE_QUADS)
    padded = F.pad(filters, (0, 0, 0, 0, 0, -rows % _TILE_ROWS))
    tiles = padded.reshape(-1, _TILE_ROWS, blocks, channels // blocks, taps)
    return tiles.permute(0, 4, 2, 1, 3).flatten()


def _arrange_columns(filters: Tensor) -> Tensor:
    rows, channels, taps = filters.shape
    depth = filters.permute(0, 2, 1).reshape(rows, taps * channels)
    padded = F.pad(depth, (0, -(taps * channels) % (4 * _TILE_QUADS), 0, -rows % _TILE_ROWS))
    tiles = padded.reshape(-1, _TILE_ROWS, padded.shape[1] // (4 * _TILE_QUADS), 4 * _TILE_QUADS)
    return tiles.transpose(1, 2).flatten()


def _arrange_depthwise(filters: Tensor) -> Tensor:
    rows, _, taps = filters.shape
    padded = F.pad(filters.reshape(rows, taps), (0, -taps % 4, 0, -rows % 4))
    return padded.reshape(-1, 4, padded.shape[1] // 4, 4).transpose(1, 2).flatten()


def _by_quads(values: Tensor) -> Tensor:
    """(4 * quads, terms) to (quads, terms, 4)."""
    return values.reshape(-1, 4, values.shape[1]).transpose(1, 2).contiguous()


def _twice(values: Tensor) -> Tensor:
    """16-bit values in both halves of int32."""
    return (
        values.to(torch.int16)[..., None]
        .expand(*values.shape, 2)
        .contiguous()
        .view(torch.int32)[..., 0]
    )


def _join(numbers: list[int], sections: dict[str, Tensor]) -> Tensor:
    """Write the header (struct Int8Header) and the sections into one buffer."""
    offsets, end = {}, -(-8 * _HEADER_FIELDS // _ALIGNMENT) * _ALIGNMENT
    bytes_of = {}
    for name, section in sections.items():
        bytes_of[name] = section.contiguous().flatten().view(torch.uint8)
        offsets[name] = end
        end += -(-bytes_of[name].numel() // _ALIGNMENT) * _ALIGNMENT
    places: list[int] = []
    for name, offset in offsets.items():
        places += [offset, bytes_of[name].numel()] if name == "filters" else [offset]
    header = torch.tensor([_MAGIC, _VERSION, end, *numbers, *places], dtype=torch.int64)
    if len(header) != _HEADER_FIELDS:
        raise AssertionError(f"the header has {len(header)} fields")
    packed = torch.zeros(end, dtype=torch.uint8)
    packed[: 8 * _HEADER_FIELDS] = header.view(torch.uint8)
    for name, offset in offsets.items():
        packed[offset : offset + bytes_of[name].numel()] = bytes_of[name]
    return packed


def _check_conv(
    conv: IntegerConv, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    shape = conv.shape
    slots = (shape.n_split, shape.n_out, shape.n_terms)
    expected = {
        "filters": (conv.filters, (shape.n_lego, shape.width, *shape.kernel), torch.int8),
        "multipliers": (conv.multipliers, slots, torch.int16),
        "index": (conv.index, slots, torch.int64),
        "shifts": (conv.shifts, (shape.n_lego,), torch.int64),
        "bias": (conv.bias, (shape.n_out,), torch.int16),
    }
    for name, (tensor, sizes, dtype) in expected.items():
        if tuple(tensor.shape) != sizes or tensor.dtype != dtype:
            raise KernelError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; the conv needs {dtype} {sizes}"
            )
    if min(shape.n_out, shape.n_lego) < 1 or shape.n_out % shape.groups:
        raise KernelError(f"{shape} is not the shape of a conv")
    low, high = int(conv.index.min()), int(conv.index.max())
    if low < 0 or high >= shape.n_lego:
        raise KernelError(f"index holds {low} to {high}; the filters are 0 to {shape.n_lego - 1}")
    if int(conv.shifts.min()) < 0 or int(conv.shifts.max()) > 24:
        raise KernelError("shifts must be 0 to 24")
    bytes_ = (conv.x_zero, conv.low, conv.high, conv.residual_zero)
    if not all(0 <= value <= 255 for value in bytes_) or not 0 <= conv.out_shift <= 15:
        raise KernelError(
            "zero points and bounds of a quantised conv are 0 to 255, and out_shift is 0 to 15"
        )
    if abs(conv.residual_multiplier) > 32767:
        raise KernelError("residual_multiplier must be -32767 to 32767")
    if conv.table is not None and (conv.table.dtype != torch.uint8 or conv.table.shape != (256,)):
        raise KernelError("the table of a quantised conv has 256 values of uint8")
    products = shape.width * shape.kernel[0] * shape.kernel[1]
    if products > MAX_PRODUCTS or shape.kernel[0] * shape.kernel[1] > MAX_TAPS:
        raise KernelError(
            f"a filter of {products} values and {shape.kernel} taps is too large for the int8 "
            f"kernels, which take {MAX_PRODUCTS} values and {MAX_TAPS} taps"
        )
    if min(*stride, *dilation) < 1 or min(padding) < 0 or len(padding) != 4:
        raise KernelError("strides and dilations are at least 1, and there are four paddings")
