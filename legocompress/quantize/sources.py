"""What an integer conv is made of: weights on the int8 grid, and one factor for each term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from legocompress.deploy.folding import FoldedConv, scale_and_shift
from legocompress.deploy.geometry import Geometry
from legocompress.lego.algebra import assemble
from legocompress.lego.module import LegoModule
from legocompress.lego.shape import UnitShape
from legocompress.lego.storage import quantize_filters, round_to_storage
from legocompress.lego.unit import LegoUnit

LARGEST = 127  # of the int8 values


@dataclass(frozen=True, eq=False)
class ConvSource:
    """A conv whose filters are int8 times one scale per filter, a norm folded into its factors.

    Attributes:
        shape: sizes of the unit; a dense conv has one filter per output channel, and one term.
        is_dense: whether output channel j has filter j.
        filters: int8 (m, q, kh, kw).
        index: int64 (o, n, k).
        factors: float64 (o, n, k), the scale of the term's filter times its coefficient.
        bias: float64 (n,).
        geometry: where the filters are applied.
    """

    shape: UnitShape
    is_dense: bool
    filters: Tensor
    index: Tensor
    factors: Tensor
    bias: Tensor
    geometry: Geometry

    def weight(self) -> Tensor:
        """The dense weight (n, c/g, kh, kw), float32."""
        if self.is_dense:
            weight = self.filters.double() * self.factors.reshape(-1, 1, 1, 1)
        else:
            weight = assemble(self.shape, LegoUnit(self.filters.double(), self.index, self.factors))
        return weight.float()


@torch.no_grad()
def read_conv(folded: FoldedConv) -> ConvSource:
    """Round a conv, Lego or dense, to int8; its norm becomes part of the factors and the bias."""
    layer, shape = folded.layer, folded.shape
    n_out = shape.n_out
    scale, shift = torch.ones(n_out).double(), torch.zeros(n_out).double()
    if folded.norm is not None:
        scale, shift = scale_and_shift(folded.norm)
    bias = shift if layer.bias is None else shift + layer.bias.detach().double() * scale
    values, scales = round_weight(layer)
    index = folded.unit.index
    factors = scales[index] * scale[:, None]
    if isinstance(layer, LegoModule) and layer.coefficients is not None:
        gains = layer.coefficients.detach()
        factors = factors * round_to_storage(gains, layer.coefficients_dtype).double()
    return ConvSource(shape, not folded.is_lego, values, index, factors, bias, folded.geometry)


def round_weight(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight or the Lego filters of a layer as int8 (m, ...) and scales (m,) in float64."""
    filters = layer.lego_filters if isinstance(layer, LegoModule) else layer.weight
    assert isinstance(filters, Tensor)
    values, scales = quantize_filters(filters.detach())
    return values.contiguous(), scales.double()


def read_norm(norm: nn.Module) -> ConvSource:
    """A norm by itself, as a depthwise conv of one pixel."""
    scale, shift = scale_and_shift(norm)
    return _constant_depthwise(scale, shift, Geometry((1, 1), (1, 1), (0, 0), (1, 1), len(scale)))


def read_average(channels: int, geometry: Geometry) -> ConvSource:
    """Average pooling, as a depthwise conv with constant filters."""
    height, width = geometry.kernel
    scale = torch.full((channels,), 1 / (height * width), dtype=torch.float64)
    return _constant_depthwise(scale, torch.zeros_like(scale), geometry)


def _constant_depthwise(scale: Tensor, shift: Tensor, geometry: Geometry) -> ConvSource:
    n = len(scale)
    return ConvSource(
        shape=UnitShape(n, 1, geometry.kernel, n, n, 1, 1),
        is_dense=True,
        filters=torch.full((n, 1, *geometry.kernel), LARGEST, dtype=torch.int8),
        index=torch.arange(n).reshape(1, n, 1),
        factors=(scale / LARGEST).reshape(1, n, 1),
        bias=shift,
        geometry=geometry,
    )
