"""The integers of each operator, from its weights, the ranges of its maps, and its shifts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from legocompress.errors import CheckpointError
from legocompress.lego.integer import FRACTION, MAP_SHIFT, IntegerConv, IntegerLinear
from legocompress.quantize.activations import CLAMPS, Pointwise
from legocompress.quantize.sources import ConvSource
from legocompress.state.quantization import SHIFT_LETTERS, ConvShifts, MapRange

LARGEST = 32767  # of a multiplier, and of a sum
MAX_SHIFT = len(SHIFT_LETTERS) - 1
MAX_OUT_SHIFT = 6
HEADROOMS = (2.0, 1.25)  # of the sums of filters, over the largest one seen; tried in this order
MARGIN = 1.5  # of the sums over the terms


@dataclass
class Sums:
    """The largest sums of a conv on some images, in real values.

    Attributes:
        filters: (m,), of |sum of int8 filter times input|.
        low, high: over all partial sums of the merge, the residual included.
    """

    filters: Tensor
    low: float = 0.0
    high: float = 0.0

    def extend_filters(self, z: Tensor) -> None:
        """Take in the sums (N, rows, H', W')."""
        largest = z.detach().abs().amax((0, 2, 3)).reshape(-1, len(self.filters)).amax(0)
        self.filters = torch.maximum(self.filters, largest.double())

    def extend(self, y: Tensor) -> None:
        """Take in partial sums of the merge."""
        low, high = torch.aminmax(y.detach())
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))


def choose_shifts(
    source: ConvSource,
    sums: Sums,
    x: MapRange,
    y: MapRange,
    residual: MapRange | None,
) -> ConvShifts | None:
    """The shifts with which no sum seen on the images saturates; None where none fit 16 bits."""
    for headroom in HEADROOMS:
        shifts = _filter_shifts(source, sums.filters / x.scale, x, headroom)
        for out_shift in range(MAX_OUT_SHIFT, -1, -1):
            if _fits(source, sums, x, y, residual, shifts, out_shift):
                letters = "".join(SHIFT_LETTERS[int(shift)] for shift in shifts)
                return ConvShifts(filters=letters, output=out_shift)
    return None


def _filter_shifts(source: ConvSource, seen: Tensor, x: MapRange, headroom: float) -> Tensor:
    steps = max(x.zero, 255 - x.zero)
    possible = source.filters.double().abs().flatten(1).sum(1) * steps
    expected = torch.minimum(seen * headroom, possible)
    expected = torch.where(expected > 0, expected, possible).clamp(min=1)
    return torch.log2(expected / LARGEST).ceil().clamp(0, MAX_SHIFT).long()


def _fits(
    source: ConvSource,
    sums: Sums,
    x: MapRange,
    y: MapRange,
    residual: MapRange | None,
    shifts: Tensor,
    out_shift: int,
) -> bool:
    step = y.scale / 2**out_shift
    low = y.zero * 2**out_shift + MARGIN * sums.low / step
    high = (y.zero + 0.5) * 2**out_shift + MARGIN * sums.high / step
    multipliers = _multipliers(source, x, y, shifts, out_shift)
    return (
        low >= -LARGEST
        and high <= LARGEST
        and bool(multipliers.abs().max() <= LARGEST)
        and (residual is None or _map_multiplier(residual, y, out_shift) <= LARGEST)
    )


def _multipliers(
    source: ConvSource, x: MapRange, y: MapRange, shifts: Tensor, out_shift: int
) -> Tensor:
    """The multipliers (o, n, k) in float64, before they are rounded."""
    steps = torch.exp2(shifts.double() + out_shift + FRACTION)
    return source.factors * steps[source.index] * (x.scale / y.scale)


def _map_multiplier(x: MapRange, y: MapRange, out_shift: int) -> float:
    """The multiplier of a map that is added, before it is rounded."""
    return float(x.scale / y.scale * 2.0 ** (out_shift + FRACTION - MAP_SHIFT))


def build_conv(
    name: str,
    source: ConvSource,
    x: MapRange,
    y: MapRange,
    shifts: ConvShifts,
    *,
    clamp: str = "",
    residual: MapRange | None = None,
    table: Tensor | None = None,
) -> IntegerConv:
    """The integers of a conv.

    Args:
        name: of the layer, for errors.
        source: its weights.
        x: the range of its input.
        y: the range of its output, before the table.
        shifts: of its sums.
        clamp: 'relu' or 'relu6', or empty.
        residual: the range of the map that is added.
        table: uint8 (256,), applied last.

    Raises:
        CheckpointError: the shifts do not fit the layer.
    """
    if len(shifts.filters) != len(source.filters):
        raise CheckpointError(
            f"quantisation: layer {name!r} has {len(source.filters)} filters, and "
            f"{len(shifts.filters)} shifts are stored"
        )
    numbers = torch.tensor([SHIFT_LETTERS.index(letter) for letter in shifts.filters])
    low, high = clamp_bounds(clamp, y)
    return IntegerConv(
        shape=source.shape,
        is_dense=source.is_dense,
        filters=source.filters,
        index=source.index,
        multipliers=_to_int16(_multipliers(source, x, y, numbers, shifts.output)),
        shifts=numbers,
        bias=_to_int16(real_bias(y, shifts.output) + source.bias * (2**shifts.output / y.scale)),
        out_shift=shifts.output,
        x_zero=x.zero,
        low=low,
        high=high,
        residual_multiplier=0 if residual is None else map_multiplier(residual, y, shifts.output),
        residual_zero=0 if residual is None else residual.zero,
        table=table,
    )


def real_bias(y: MapRange, out_shift: int) -> int:
    """The zero point and the half step that every bias holds."""
    return (y.zero << out_shift) + ((1 << out_shift) >> 1)


def map_multiplier(x: MapRange, y: MapRange, out_shift: int) -> int:
    """The multiplier of a map that is added."""
    return min(LARGEST, round(_map_multiplier(x, y, out_shift)))


def add_shift(a: MapRange, b: MapRange, y: MapRange) -> int | None:
    """The out_shift with which the sum of two maps never saturates early; None if there is none."""
    for out_shift in range(MAX_OUT_SHIFT, -1, -1):
        fits = all(_map_multiplier(x, y, out_shift) <= LARGEST for x in (a, b))
        lowest = (y.zero - a.zero * a.scale / y.scale) * 2**out_shift
        highest = (y.zero + 0.5 + (255 - a.zero) * a.scale / y.scale) * 2**out_shift
        if fits and lowest >= -LARGEST and highest <= LARGEST:
            return out_shift
    return None


def gate_shift(x: MapRange, gate: MapRange, y: MapRange) -> int | None:
    """The out_shift of a product of a map and its gate; None where none fits 16 bits."""
    for out_shift in range(MAX_OUT_SHIFT, -1, -1):
        largest = max(gate.zero, 255 - gate.zero)
        if gate_multiplier(x, gate, y, out_shift) * largest / 256 <= LARGEST:
            return out_shift
    return None


def gate_multiplier(x: MapRange, gate: MapRange, y: MapRange, out_shift: int) -> int:
    """The multiplier of `integer.scale_maps`, which must fit 32 bits times 255."""
    exact = x.scale * gate.scale / y.scale * 2.0 ** (out_shift + 2 * (FRACTION - MAP_SHIFT))
    return min(round(exact), 2**23 - 1)


def clamp_bounds(clamp: str, y: MapRange) -> tuple[int, int]:
    """The bounds of the uint8 output of an activation that clamps."""
    if not clamp:
        return 0, 255
    steps = CLAMPS[clamp] / y.scale
    return y.zero, 255 if steps > 255 else min(255, y.zero + round(steps))


def build_table(pointwise: Pointwise, x: MapRange, y: MapRange) -> Tensor:
    """The table of an activation: uint8 (256,)."""
    values = (torch.arange(256, dtype=torch.float64) - x.zero) * x.scale
    steps = (pointwise(values) / y.scale).nan_to_num(0.0).round() + y.zero
    return steps.clamp(0, 255).to(torch.uint8)


def build_linear(weight: Tensor, scales: Tensor, bias: Tensor | None, x: MapRange) -> IntegerLinear:
    """The integers of a linear layer: int8 weight (n, c), scales (n,) in float64, bias (n,)."""
    return IntegerLinear(
        weight=weight,
        scales=(scales * x.scale).float(),
        bias=torch.zeros(len(weight)) if bias is None else bias.detach().float(),
        x_zero=x.zero,
    )


def _to_int16(values: Tensor) -> Tensor:
    return values.round().clamp(-LARGEST, LARGEST).to(torch.int16)
