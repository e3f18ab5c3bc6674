"""The operators of a network that have an integer form, each computing in fp32.

They stand in the traced graph where ranges are measured, and where an operator stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legocompress.deploy.activation import Activation, activate_
from legocompress.deploy.folding import FoldedConv
from legocompress.lego.algebra import slot_rows
from legocompress.quantize.activations import CLAMPS, Pointwise, silu
from legocompress.quantize.sources import ConvSource, read_conv


class FloatLayer(nn.Module):
    """An operator with an integer form; `name` is that of its output."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class ClampedLayer(FloatLayer):
    """An operator whose output may be clamped, or looked up in a table of an activation.

    `clamp` is 'relu' or 'relu6' or empty; `pointwise` is the activation of a table.
    """

    clamp: str = ""
    pointwise: Pointwise | None = None

    @property
    def is_plain(self) -> bool:
        """Whether no activation follows yet."""
        return not self.clamp and self.pointwise is None

    @property
    def pre_name(self) -> str:
        """The name of what the table reads."""
        return f"{self.name}.pre"

    def activate(self, y: Tensor) -> Tensor:
        """Apply the activation."""
        if self.clamp:
            return y.clamp(0, CLAMPS[self.clamp])
        return y if self.pointwise is None else self.pointwise(y)


class ConvLayer(ClampedLayer):
    """A conv with its norm, residual sum and activation.

    `folded` is None for norms and average pooling by themselves, which no layer holds. With
    `is_exact` the weights are not rounded to int8.
    """

    is_exact = False

    def __init__(self, name: str, source: ConvSource, folded: FoldedConv | None = None) -> None:
        super().__init__(name)
        self.source, self.folded = source, folded
        self._values: tuple[bool, Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer: (N, c, H, W) and perhaps (N, n, H', W') to (N, n, H', W')."""
        y = self.convolve(x)
        return self.activate(y if residual is None else y + residual)

    def convolve(self, x: Tensor) -> Tensor:
        """The conv alone, with its bias."""
        g = self.source.geometry
        weight, bias = self._weight_and_bias()
        x, padding = g.pad_input(x)
        return F.conv2d(x, weight, bias, g.stride, padding, g.dilation, g.groups)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        if self._values is None or self._values[0] != self.is_exact:
            if self.is_exact and self.folded is not None:
                self._values = (True, self.folded.weight(), self.folded.bias)
            else:
                self._values = (self.is_exact, self.source.weight(), self.source.bias.float())
        return self._values[1:]

    def transform(self, x: Tensor) -> Tensor:
        """The sums Z of int8 filters and float values: (N, rows, H', W')."""
        source, shape, g = self.source, self.source.shape, self.source.geometry
        x, padding = g.pad_input(x)
        filters = source.filters.float()
        if source.is_dense:
            return F.conv2d(x, filters, None, g.stride, padding, g.dilation, g.groups)
        missing = shape.n_split * shape.width - shape.channels
        parts = F.pad(x.reshape(-1, shape.channels, *x.shape[2:]), (0, 0, 0, 0, 0, missing))
        parts = parts.reshape(-1, shape.width, *x.shape[2:])
        z = F.conv2d(parts, filters, None, g.stride, padding, g.dilation)
        return z.reshape(len(x), -1, *z.shape[2:])

    def merge(self, z: Tensor, on_sum: Callable[[Tensor], None]) -> Tensor:
        """Sum the rows in the order of the integer merge; `on_sum` gets every partial sum."""
        source, shape = self.source, self.source.shape
        numbers = source.index if source.is_dense else slot_rows(shape, source.index)
        y = source.bias.float().reshape(1, -1, 1, 1)
        on_sum(y)
        for i in range(shape.n_split):
            for t in range(shape.n_terms):
                factors = source.factors[i, :, t].float().reshape(1, -1, 1, 1)
                y = y + factors * z.index_select(1, numbers[i, :, t])
                on_sum(y)
        return y


def deployed_conv_layer(name: str, folded: FoldedConv) -> ConvLayer:
    """The layer of a fused conv."""
    layer = ConvLayer(name, read_conv(folded), folded)
    if folded.activation in CLAMPS:
        layer.clamp = folded.activation
    elif folded.activation == "silu":
        layer.pointwise = silu
    return layer


class LinearLayer(FloatLayer):
    """A linear layer with its activation, (N, c) to (N, n)."""

    def __init__(self, name: str, layer: nn.Linear, activation: Activation) -> None:
        super().__init__(name)
        self.layer = (layer,)  # in a tuple, so that it is no part of this module
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        layer = self.layer[0]
        return activate_(F.linear(x, layer.weight, layer.bias), self.activation)


class PoolLayer(FloatLayer):
    """Max pooling; `arguments` are those of F.max_pool2d after the input."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        super().__init__(name)
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        """Pool maps (N, c, H, W)."""
        y: Tensor = F.max_pool2d(x, *self.arguments)
        return y


class MeanLayer(FloatLayer):
    """The mean of each map, (N, c, H, W) to (N, c, 1, 1), or to (N, c) without `keeps_axes`."""

    def __init__(self, name: str, keeps_axes: bool) -> None:
        super().__init__(name)
        self.keeps_axes = keeps_axes

    def forward(self, x: Tensor) -> Tensor:
        """Average maps."""
        return x.mean((2, 3), keepdim=self.keeps_axes)


class AddLayer(ClampedLayer):
    """The sum of two maps of one size."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Add maps (N, c, H, W)."""
        return self.activate(a + b)


class GateLayer(FloatLayer):
    """Each map (N, c, H, W) times its gate (N, c, 1, 1)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Multiply."""
        return x * gate


class PointwiseLayer(FloatLayer):
    """An activation by itself."""

    def __init__(self, name: str, kind: str, pointwise: Pointwise) -> None:
        super().__init__(name)
        self.kind, self.pointwise = kind, pointwise

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        return self.pointwise(x)


class CatLayer(FloatLayer):
    """Maps side by side along an axis."""

    def __init__(self, name: str, axis: int) -> None:
        super().__init__(name)
        self.axis = axis

    def forward(self, *maps: Tensor) -> Tensor:
        """Join maps."""
        return torch.cat(maps, self.axis)
