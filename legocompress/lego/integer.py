"""The arithmetic of quantised layers: every operator from uint8 maps to a uint8 map, in integers.

A map q (uint8) with scale s and zero point z stands for the real values s * (q - z). These plain
functions define the result of every operator bit for bit; the compiled kernels must equal them.

Sums of products are exact. After them, everything is 16-bit arithmetic that each processor has:
a product is `multiply_high`, a sum saturates. A conv, Lego or dense, computes in three steps:

    Z[i, f] = sum over channels of split i and taps: filters[f] * (x - x_zero)        (32 bits)
    R[i, f] = saturate16((Z[i, f] + 2^(shifts[f] - 1)) >> shifts[f])                  (16 bits)
    Y[j]    = bias[j] + sum over i, t: multiply_high(multipliers[i,j,t], R[i, index[i,j,t]])
              + multiply_high(residual_multiplier, (residual - residual_zero) << 7)   (16 bits)
    y[j]    = table[clamp(Y[j] >> out_shift, low, high)]                              (uint8)

The sum over the terms saturates after each addition: bias first, then the splits in order, in each
the terms in order, then the residual. The bias already holds the zero point of the output, shifted
left by out_shift, and 2^(out_shift - 1) for rounding. A dense conv is the case of one split and one
term, in which every output channel has a filter of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.lego.algebra import slot_rows
from legocompress.lego.shape import UnitShape

FRACTION = 15  # bits after the point of a multiplier: it stands for multiplier / 2^15
MAP_SHIFT = 7  # a centred uint8 value is multiplied as value << 7, which fits 16 bits
WIDE_FRACTION = 24  # bits after the point of a multiplier of sums over whole maps


@dataclass(frozen=True)
class IntegerConv:
    """The integers of a conv.

    Attributes:
        shape: sizes of the unit. A dense conv has n_lego = n, n_split = n_terms = 1.
        is_dense: whether output channel j has filter j; then `index` is 0, 1, ..., n - 1.
        filters: int8 (m, q, kh, kw), in [-127, 127].
        index: int64 (o, n, k).
        multipliers: int16 (o, n, k), in [-32767, 32767].
        shifts: int64 (m,), in [0, 24].
        bias: int16 (n,).
        out_shift: in [0, 7].
        x_zero: zero point of the input, which also stands in the padding.
        low, high: bounds of the output, in [0, 255].
        residual_multiplier, residual_zero: of the map that is added; 0 where there is none.
        table: uint8 (256,), applied last; None where the output is not looked up.
    """

    shape: UnitShape
    is_dense: bool
    filters: Tensor
    index: Tensor
    multipliers: Tensor
    shifts: Tensor
    bias: Tensor
    out_shift: int
    x_zero: int
    low: int = 0
    high: int = 255
    residual_multiplier: int = 0
    residual_zero: int = 0
    table: Tensor | None = None


@dataclass(frozen=True)
class IntegerLinear:
    """A linear layer from uint8 (N, c) to float32 (N, n).

    y[j] = float32(float32(sum * scales[j]) + bias[j]), with the exact sum of
    weight[j] * (x - x_zero).

    Attributes:
        weight: int8 (n, c), in [-127, 127].
        scales: float32 (n,): the input's scale times the weight's.
        bias: float32 (n,).
        x_zero: zero point of the input.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor
    x_zero: int


def multiply_high(a: Tensor, b: Tensor) -> Tensor:
    """(a * b + 2^14) >> 15 of int32 tensors that hold 16-bit values (pmulhrsw, sqrdmulh)."""
    return (a * b + (1 << (FRACTION - 1))) >> FRACTION


def saturate(values: Tensor) -> Tensor:
    """Clamp integers to [-32768, 32767]."""
    return values.clamp(-32768, 32767)


def quantize_map(x: Tensor, scale: float, zero: int) -> Tensor:
    """uint8 of float32 x: clamp(round(x * (1 / scale)) + zero), halves to even."""
    inverse = torch.tensor(1.0, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32)
    steps = (x.float() * inverse.to(x.device)).round() + zero
    return steps.clamp(0, 255).to(torch.uint8)


def dequantize_map(q: Tensor, scale: float, zero: int) -> Tensor:
    """float32 of uint8 q: (q - zero) * scale, rounded once."""
    return (q.to(torch.int32) - zero).float() * scale


def transform(
    conv: IntegerConv,
    x: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The exact sums Z as int32: (N, rows, H', W').

    Args:
        conv: the integers of the conv.
        x: uint8 (N, c, H, W).
        stride: of the conv.
        padding: pixels to the left, to the right, on top and at the bottom.
        dilation: of the conv.

    Returns:
        One row per group, split and Lego filter, in this order; of a dense conv one per output.
    """
    shape = conv.shape
    # float64 holds every sum exactly, whatever algorithm the library takes.
    centred = F.pad(x.double() - conv.x_zero, padding)
    filters = conv.filters.double()
    if conv.is_dense:
        z = F.conv2d(centred, filters, None, stride, 0, dilation, shape.groups)
        return z.round().to(torch.int32)
    height, width = centred.shape[2:]
    missing = shape.n_split * shape.width - shape.channels
    parts = F.pad(centred.reshape(-1, shape.channels, height, width), (0, 0, 0, 0, 0, missing))
    parts = parts.reshape(-1, shape.width, height, width)
    z = F.conv2d(parts, filters, None, stride, 0, dilation).round().to(torch.int32)
    return z.reshape(len(x), -1, *z.shape[2:])


def narrow(conv: IntegerConv, z: Tensor) -> Tensor:
    """Round the sums Z (N, rows, H', W') to 16 bits, kept in int32."""
    shifts = conv.shifts.repeat(z.shape[1] // len(conv.shifts)).to(torch.int32)
    halves = (1 << shifts) >> 1
    shape = (1, -1, 1, 1)
    # A sum near the limit of 32 bits must not overflow when it is rounded.
    rounded = (z.long() + halves.reshape(shape)) >> shifts.reshape(shape)
    return saturate(rounded).to(torch.int32)


def merge(conv: IntegerConv, rows: Tensor, residual: Tensor | None = None) -> Tensor:
    """Sum the rows R (N, rows, H', W') to the output map, uint8 (N, n, H', W')."""
    wide = (1, -1, 1, 1)
    numbers = conv.index if conv.is_dense else slot_rows(conv.shape, conv.index)
    multipliers = conv.multipliers.to(torch.int32)
    y = conv.bias.to(torch.int32).reshape(wide)
    for i in range(conv.shape.n_split):
        for t in range(conv.shape.n_terms):
            term = rows.index_select(1, numbers[i, :, t])
            y = saturate(y + multiply_high(multipliers[i, :, t].reshape(wide), term))
    if residual is not None:
        centred = (residual.to(torch.int32) - conv.residual_zero) << MAP_SHIFT
        factor = torch.tensor(conv.residual_multiplier, dtype=torch.int32, device=y.device)
        y = saturate(y + multiply_high(factor, centred))
    return finish(y, conv.out_shift, conv.low, conv.high, conv.table)


def finish(
    y: Tensor, out_shift: int, low: int = 0, high: int = 255, table: Tensor | None = None
) -> Tensor:
    """Turn 16-bit sums into the uint8 output: shift, clamp, and look up."""
    q = (y >> out_shift).clamp(low, high)
    return q.to(torch.uint8) if table is None else table[q.long()]


def convolve(
    conv: IntegerConv,
    x: Tensor,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """A quantised conv: uint8 (N, c, H, W) to uint8 (N, n, H', W'); see `transform`."""
    return merge(conv, narrow(conv, transform(conv, x, stride, padding, dilation)), residual)


def apply_linear(linear: IntegerLinear, x: Tensor) -> Tensor:
    """A quantised linear layer: uint8 (N, c) to float32 (N, n)."""
    sums = (x.double() - linear.x_zero) @ linear.weight.double().T
    return sums.to(torch.float32) * linear.scales + linear.bias


def add_maps(
    a: Tensor,
    b: Tensor,
    zeros: tuple[int, int],
    multipliers: tuple[int, int],
    bias: int,
    out_shift: int,
    low: int = 0,
    high: int = 255,
) -> Tensor:
    """The sum of two uint8 maps of one shape, as uint8.

    Y = bias + multiply_high(multipliers[0], (a - zeros[0]) << 7), then the same with b, saturated
    after each addition; then `finish`.
    """
    y = torch.tensor(bias, dtype=torch.int32, device=a.device)
    for x, zero, multiplier in zip((a, b), zeros, multipliers, strict=True):
        factor = torch.tensor(multiplier, dtype=torch.int32, device=a.device)
        y = saturate(y + multiply_high(factor, (x.to(torch.int32) - zero) << MAP_SHIFT))
    return finish(y, out_shift, low, high)


def average_maps(x: Tensor, x_zero: int, multiplier: int, zero: int) -> Tensor:
    """The mean of each map: uint8 (N, c, H, W) to uint8 (N, c, 1, 1).

    clamp(((sum of (x - x_zero)) * multiplier + 2^23) >> 24) + zero), with a 64-bit product;
    `multiplier` is 2^24 * s_x / (s_y * H * W), rounded.
    """
    sums = (x.long() - x_zero).sum((2, 3), keepdim=True)
    steps = (sums * multiplier + (1 << (WIDE_FRACTION - 1))) >> WIDE_FRACTION
    return (steps + zero).clamp(0, 255).to(torch.uint8)


def scale_maps(
    x: Tensor,
    gate: Tensor,
    zeros: tuple[int, int],
    multiplier: int,
    bias: int,
    out_shift: int,
) -> Tensor:
    """Each map of x (N, c, H, W) times its gate (N, c, 1, 1), all uint8.

    factor = saturate16(((gate - zeros[1]) * multiplier + 2^7) >> 8), in 32 bits;
    Y = saturate16(bias + multiply_high(factor, (x - zeros[0]) << 7)); then `finish`.
    """
    factor = saturate(((gate.to(torch.int32) - zeros[1]) * multiplier + 128) >> 8)
    y = saturate(bias + multiply_high(factor, (x.to(torch.int32) - zeros[0]) << MAP_SHIFT))
    return finish(y, out_shift)
