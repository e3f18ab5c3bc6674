"""The layers of a quantised network in float32, each rounding its output to the range of its map.

A layer with weights holds them as buffers in their storage dtypes. In letters: n outputs, o splits,
m Lego filters, k terms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legocompress.deploy.activation import activate_
from legocompress.deploy.folding import scale_and_shift
from legocompress.export.program import Form, index_dtype
from legocompress.export.qdq_operators import (
    dequantize,
    dequantize_filters,
    round_map,
    round_weight,
)
from legocompress.lego.algebra import assemble, slot_rows, transform
from legocompress.lego.module import LegoModule
from legocompress.lego.storage import TORCH_DTYPES, quantize_filters
from legocompress.lego.unit import LegoUnit
from legocompress.quantize.layers import ConvLayer, FloatLayer, LinearLayer
from legocompress.quantize.operators import IntegerOperator
from legocompress.quantize.ranges import make_range
from legocompress.quantize.sources import round_weight as read_int8
from legocompress.state.quantization import MapRange

LARGEST_BIAS = 2.0**30  # in steps of its int32 scale
SMALLEST_SCALE = 1e-30


class RoundedMap(IntegerOperator):
    """A map rounded to uint8, as float32."""

    def __init__(self, name: str, out: MapRange) -> None:
        super().__init__(name, out.zero)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        """Round a map."""
        return round_to(x, self.out)


class RoundedLayer(IntegerOperator):
    """An operator without weights, whose output is rounded."""

    def __init__(self, layer: FloatLayer, out: MapRange) -> None:
        super().__init__(layer.name, out.zero)
        self.layer, self.out = layer, out

    def forward(self, *maps: Tensor) -> Tensor:
        """Run the layer."""
        return round_to(self.layer(*maps), self.out)


def round_to(x: Tensor, out: MapRange) -> Tensor:
    """A map rounded to a range, as float32."""
    y: Tensor = round_map(x, out.scale, out.zero)
    return y


class RoundedConv(IntegerOperator):
    """A conv with residual sum and activation on rounded maps; the weight is int8.

    Args:
        layer: the conv.
        form: how a Lego layer is stored and computed, see `export_onnx`.
        x: the range of its input.
        out: the range of its output.
        before: the range of what its table reads, if it has one.
        residual: the range of the map that is added.
    """

    filters: Tensor
    filter_scales: Tensor
    index: Tensor
    coefficients: Tensor | None
    factors: Tensor | None
    values: Tensor
    scales: Tensor
    bias: Tensor
    bias_scales: Tensor | None

    def __init__(
        self,
        layer: ConvLayer,
        form: Form,
        x: MapRange,
        out: MapRange,
        before: MapRange | None,
        residual: MapRange | None,
    ) -> None:
        super().__init__(layer.name)
        source = layer.source
        self.geometry, self.shape = source.geometry, source.shape
        self.clamp, self.pointwise = layer.clamp, layer.pointwise
        self.out, self.before = out, before
        self.sum_range: MapRange | None = None
        self.form: Form = "dense" if source.is_dense else form
        if self.form != "dense":
            self._store_unit(layer)
        if self.form == "lego":
            self.register_buffer("bias", source.bias.float())
            return
        if residual is not None:
            self.sum_range = summand_range(before or out, residual)
        weight, bias = source_weight(layer), source.bias
        factors = source.factors.flatten() if source.is_dense else None
        values, scales = quantize_channels(weight, factors, bias, x.scale)
        if self.form == "dense":
            self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        _store_bias(self, bias, scales, x)

    def _store_unit(self, layer: ConvLayer) -> None:
        assert layer.folded is not None
        source, owner, norm = layer.source, layer.folded.layer, layer.folded.norm
        assert isinstance(owner, LegoModule)
        filters, scales = quantize_filters(owner.lego_filters.detach())
        self.register_buffer("filters", filters.contiguous())
        self.register_buffer("filter_scales", scales)
        self.register_buffer("index", source.index.to(index_dtype(source.shape.n_lego)))
        gains = None
        if owner.coefficients is not None:
            gains = owner.coefficients.detach().to(TORCH_DTYPES[owner.coefficients_dtype])
        self.register_buffer("coefficients", gains)
        factors = None if norm is None else scale_and_shift(norm)[0].float()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer: (N, c, H, W) and perhaps (N, n, H', W') to (N, n, H', W')."""
        y = self._merge(x) if self.form == "lego" else self._convolve(x)
        if residual is not None:
            if self.sum_range is not None:
                y = round_to(y, self.sum_range)
            y = y + residual
        if self.pointwise is not None:
            assert self.before is not None
            y = self.pointwise(round_to(y, self.before))
        elif self.clamp:
            y = F.relu(y) if self.clamp == "relu" else F.relu6(y)
        return round_to(y, self.out)

    def _convolve(self, x: Tensor) -> Tensor:
        g = self.geometry
        x, padding = g.pad_input(x)
        if self.form == "dense":
            weight = dequantize(self.values, self.scales)
        else:
            weight = round_weight(self._assemble(), self.scales)
        return F.conv2d(x, weight, _bias(self), g.stride, padding, g.dilation, g.groups)

    def _unit(self, filters: Tensor) -> LegoUnit:
        gains = self.coefficients
        return LegoUnit(
            filters, self.index.to(torch.int64), None if gains is None else gains.float()
        )

    def _assemble(self) -> Tensor:
        scales = self.filter_scales.float().reshape(-1, 1, 1, 1)
        weight = assemble(self.shape, self._unit(self.filters.float() * scales))
        factors = self.factors
        return weight if factors is None else weight * factors.reshape(-1, 1, 1, 1)

    def _merge(self, x: Tensor) -> Tensor:
        # The scales of the filters join the coefficients, as in the integers: OpenVINO loses scales
        # per filter of a conv whose output is reshaped.
        g, shape = self.geometry, self.shape
        x, padding = g.pad_input(x)
        unit = self._unit(dequantize_filters(self.filters))
        z = transform(shape, unit.lego_filters, x, g.stride, padding, g.dilation)
        z = z.reshape(-1, shape.groups * shape.n_split * shape.n_lego, *z.shape[2:])
        rows, y = slot_rows(shape, unit.index), self.bias.reshape(1, -1, 1, 1)
        factors = self._term_factors(unit)
        for i in range(shape.n_split):
            for t in range(shape.n_terms):
                term = z.index_select(1, rows[i, :, t])
                y = y + term * factors[i, :, t].reshape(1, -1, 1, 1)
        return y

    def _term_factors(self, unit: LegoUnit) -> Tensor:
        """What each term (o, n, k) is multiplied by."""
        slots = unit.index.reshape(-1)
        scales = self.filter_scales.float().index_select(0, slots).reshape(unit.index.shape)
        if unit.coefficients is not None:
            scales = scales * unit.coefficients
        factors = self.factors
        return scales if factors is None else scales * factors.reshape(1, -1, 1)


class RoundedLinear(IntegerOperator):
    """A linear layer with its activation on a rounded map (N, c), to float32 (N, n)."""

    values: Tensor
    scales: Tensor
    bias: Tensor
    bias_scales: Tensor | None

    def __init__(self, layer: LinearLayer, x: MapRange) -> None:
        super().__init__(layer.name)
        self.activation = layer.activation
        owner = layer.layer[0]
        values, scales = read_int8(owner)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales.float())
        bias = torch.zeros(len(values)) if owner.bias is None else owner.bias.detach()
        _store_bias(self, bias.double(), scales.float(), x)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        y = F.linear(x, dequantize(self.values, self.scales), _bias(self))
        return activate_(y, self.activation)


class PlainConv(nn.Module):
    """A conv that stays in fp32, with its dense weight."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: ConvLayer) -> None:
        super().__init__()
        self.layer = layer
        weight, bias = layer._weight_and_bias()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer: (N, c, H, W) and perhaps (N, n, H', W') to (N, n, H', W')."""
        g = self.layer.source.geometry
        x, padding = g.pad_input(x)
        y = F.conv2d(x, self.weight, self.bias, g.stride, padding, g.dilation, g.groups)
        return self.layer.activate(y if residual is None else y + residual)


def summand_range(out: MapRange, residual: MapRange) -> MapRange:
    """The range of a conv's output before a residual is added, where the sum has the range `out`.

    Values outside it saturate the sum, too, whatever is added. Runtimes run a conv in int8 only if
    its own output is rounded.
    """
    low = -out.zero * out.scale - (255 - residual.zero) * residual.scale
    high = (255 - out.zero) * out.scale + residual.zero * residual.scale
    return make_range(low, high)


def source_weight(layer: ConvLayer) -> Tensor:
    """The dense weight (n, c/g, kh, kw) in float64."""
    source = layer.source
    if source.is_dense:
        return source.filters.double() * source.factors.reshape(-1, 1, 1, 1)
    return assemble(source.shape, LegoUnit(source.filters.double(), source.index, source.factors))


def quantize_channels(
    weight: Tensor, factors: Tensor | None, bias: Tensor, x_scale: float
) -> tuple[Tensor, Tensor]:
    """Int8 values (n, ...) and float32 scales (n,) of a float64 weight.

    Args:
        weight: (n, ...).
        factors: the scales (n,), perhaps negative, if the weight is on an int8 grid already.
        bias: (n,), which must fit into int32 times the scale of the sums.
        x_scale: of the input.
    """
    limit = weight.abs().flatten(1).amax(1) / 127 if factors is None else factors.abs()
    smallest = (bias.abs() / (LARGEST_BIAS * x_scale)).clamp(min=SMALLEST_SCALE)
    scales = torch.maximum(limit, smallest).float()
    steps = weight / scales.double().reshape(-1, *[1] * (weight.dim() - 1))
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def _store_bias(module: nn.Module, bias: Tensor, scales: Tensor, x: MapRange) -> None:
    """Store a bias as int32 times the scale of the sums, as runtimes read it."""
    steps = scales * x.scale
    exact = (bias.double() / steps.double()).round()
    if bool((exact.abs() < 2.0**31 - 1).all()) and bool((steps > 0).all()):
        module.register_buffer("bias", exact.to(torch.int32))
        module.register_buffer("bias_scales", steps)
    else:
        module.register_buffer("bias", bias.float())
        module.register_buffer("bias_scales", None)


def _bias(module: RoundedConv | RoundedLinear) -> Tensor:
    if module.bias_scales is None:
        return module.bias
    bias: Tensor = dequantize(module.bias, module.bias_scales)
    return bias
