"""The emulation: each operator as a module that computes on uint8 maps, by `lego.integer`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legocompress.deploy.activation import Activation, activate_
from legocompress.deploy.geometry import Geometry
from legocompress.lego import integer
from legocompress.lego.integer import IntegerConv, IntegerLinear
from legocompress.state.quantization import MapRange

EXACT_IN_FLOAT32 = 2**24  # integers up to here


class IntegerOperator(nn.Module):
    """An operator of a quantised network; `name` is that of its output.

    `out_zero` is the zero point of its output, if that is a uint8 map.
    """

    def __init__(self, name: str, out_zero: int = 0) -> None:
        super().__init__()
        self.name, self.out_zero = name, out_zero


class QuantizeMap(IntegerOperator):
    """float32 to uint8."""

    def __init__(self, name: str, out: MapRange) -> None:
        super().__init__(name, out.zero)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        """Round a map."""
        return integer.quantize_map(x, self.out.scale, self.out.zero)


class DequantizeMap(IntegerOperator):
    """uint8 to float32."""

    def __init__(self, name: str, x: MapRange) -> None:
        super().__init__(name)
        self.x = x

    def forward(self, q: Tensor) -> Tensor:
        """The values that a map stands for."""
        return integer.dequantize_map(q, self.x.scale, self.x.zero)


class IntegerConvLayer(IntegerOperator):
    """A conv with residual sum and activation, see `lego.integer.convolve`."""

    def __init__(self, name: str, conv: IntegerConv, geometry: Geometry) -> None:
        super().__init__(name)
        self.conv, self.geometry = conv, geometry
        steps = max(conv.x_zero, 255 - conv.x_zero)
        largest = conv.filters.double().abs().flatten(1).sum(1).max() * steps
        # Then sums are exact in float32, in whatever order a library adds.
        self.is_exact_in_float32 = bool(largest < EXACT_IN_FLOAT32)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer: uint8 (N, c, H, W) to uint8 (N, n, H', W')."""
        g = self.geometry
        x, padding = pad_map(g, x)
        if self.is_exact_in_float32 and x.device.type == "cpu":
            z = self._transform_in_float32(x, padding)
        else:
            z = integer.transform(self.conv, x, g.stride, padding, g.dilation)
        return integer.merge(self.conv, integer.narrow(self.conv, z), residual)

    def _transform_in_float32(self, x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
        """`lego.integer.transform`, several times as fast."""
        conv, g, shape = self.conv, self.geometry, self.conv.shape
        centred = F.pad(x.float() - conv.x_zero, padding)
        filters = conv.filters.float()
        if conv.is_dense:
            z = F.conv2d(centred, filters, None, g.stride, 0, g.dilation, shape.groups)
            return z.round().to(torch.int32)
        height, width = centred.shape[2:]
        missing = shape.n_split * shape.width - shape.channels
        parts = F.pad(centred.reshape(-1, shape.channels, height, width), (0, 0, 0, 0, 0, missing))
        parts = parts.reshape(-1, shape.width, height, width)
        z = F.conv2d(parts, filters, None, g.stride, 0, g.dilation).round().to(torch.int32)
        return z.reshape(len(x), -1, *z.shape[2:])


def pad_map(geometry: Geometry, x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """A uint8 map, padded where its own values pad it, and the padding with the zero point.

    The padding is given as pixels to the left, to the right, on top and at the bottom.
    """
    if geometry.same:
        rows, columns = geometry.same_padding(x, 0), geometry.same_padding(x, 1)
        left, top = columns // 2, rows // 2
        return x, (left, columns - left, top, rows - top)
    if any(geometry.pad):
        left, right, top, bottom = geometry.pad
        if geometry.mode == "constant":
            return x, (left, right, top, bottom)
        padded = F.pad(x.float(), geometry.pad, geometry.mode).to(torch.uint8)
        return padded, (0, 0, 0, 0)
    height, width = geometry.padding
    return x, (width, width, height, height)


class IntegerLinearLayer(IntegerOperator):
    """A linear layer with its activation: uint8 (N, c) to float32 (N, n)."""

    def __init__(self, name: str, linear: IntegerLinear, activation: Activation) -> None:
        super().__init__(name)
        self.linear, self.activation = linear, activation

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        return activate_(integer.apply_linear(self.linear, x), self.activation)


class IntegerPool(IntegerOperator):
    """Max pooling of uint8 maps; the arguments are those of F.max_pool2d after the input."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        super().__init__(name)
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        """Pool maps (N, c, H, W)."""
        y: Tensor = F.max_pool2d(x.float(), *self.arguments)
        return y.to(torch.uint8)


class IntegerMean(IntegerOperator):
    """The mean of each map: uint8 (N, c, H, W) to uint8 (N, c, 1, 1), or (N, c)."""

    def __init__(self, name: str, x: MapRange, out: MapRange, keeps_axes: bool) -> None:
        super().__init__(name)
        self.x, self.out, self.keeps_axes = x, out, keeps_axes

    def forward(self, x: Tensor) -> Tensor:
        """Average maps."""
        y = integer.average_maps(x, self.x.zero, self.multiplier(x), self.out.zero)
        return y if self.keeps_axes else y.flatten(1)

    def multiplier(self, x: Tensor) -> int:
        """The multiplier for maps of the size of x."""
        pixels = int(x.shape[2]) * int(x.shape[3])
        exact = 2**integer.WIDE_FRACTION * self.x.scale / (self.out.scale * pixels)
        return int(min(round(exact), 2**31 - 1))


class IntegerAdd(IntegerOperator):
    """The sum of two maps, see `lego.integer.add_maps`, whose arguments follow the maps."""

    def __init__(
        self,
        name: str,
        zeros: tuple[int, int],
        multipliers: tuple[int, int],
        bias: int,
        out_shift: int,
        bounds: tuple[int, int],
    ) -> None:
        super().__init__(name)
        self.zeros, self.multipliers, self.bias = zeros, multipliers, bias
        self.out_shift, self.bounds = out_shift, bounds

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Add maps (N, c, H, W)."""
        numbers = (self.zeros, self.multipliers, self.bias, self.out_shift)
        return integer.add_maps(a, b, *numbers, *self.bounds)


class IntegerGate(IntegerOperator):
    """Each map times its gate, see `lego.integer.scale_maps`, whose arguments follow the maps."""

    def __init__(
        self, name: str, zeros: tuple[int, int], multiplier: int, bias: int, out_shift: int
    ) -> None:
        super().__init__(name)
        self.zeros, self.multiplier = zeros, multiplier
        self.bias, self.out_shift = bias, out_shift

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Multiply maps (N, c, H, W) by gates (N, c, 1, 1)."""
        return integer.scale_maps(x, gate, self.zeros, self.multiplier, self.bias, self.out_shift)


class IntegerTable(IntegerOperator):
    """An activation by itself: a table of 256 entries."""

    def __init__(self, name: str, table: Tensor) -> None:
        super().__init__(name)
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        """Look up each value."""
        return self.table[x.long()]


class IntegerCat(IntegerOperator):
    """Maps of one range side by side."""

    def __init__(self, name: str, axis: int) -> None:
        super().__init__(name)
        self.axis = axis

    def forward(self, *maps: Tensor) -> Tensor:
        """Join maps."""
        return torch.cat(maps, self.axis)
