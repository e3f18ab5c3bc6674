"""Folding a norm into the conv before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import FrozenBatchNormAct2d
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from legocompress.deploy.activation import Activation
from legocompress.deploy.geometry import Geometry
from legocompress.deploy.hooks import is_hooked
from legocompress.lego.algebra import assemble
from legocompress.lego.module import LegoModule
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit

FOLDABLE_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, FrozenBatchNormAct2d, FrozenBatchNorm2d,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class FoldedConv:
    """The values of a deployed conv: y = activation(norm(conv(x)) + residual), the norm folded in.

    A Lego layer has its own unit. A dense layer is stored as a unit of one split in which each
    output channel has its own filter: filters (n, c/g, kh, kw), index (1, n, 1), coefficients None.
    The bias is (n,) or None. `layer` and `norm` are what was folded.
    """

    shape: UnitShape
    unit: LegoUnit
    bias: Tensor | None
    geometry: Geometry
    activation: Activation
    is_lego: bool
    layer: nn.Conv2d
    norm: nn.Module | None

    @property
    def is_depthwise(self) -> bool:
        """Whether it is a dense layer whose output channels read one input channel each."""
        return not self.is_lego and self.geometry.groups > 1 and self.shape.channels == 1

    def weight(self) -> Tensor:
        """The dense weight (n, c/g, kh, kw)."""
        if not self.is_lego:
            return self.unit.lego_filters
        return assemble(self.shape, self.unit)


def is_foldable(norm: nn.Module) -> bool:
    """Whether a norm only scales and shifts each channel in eval mode, by constants."""
    has_expected_forward = any(type(norm).forward is kind.forward for kind in FOLDABLE_NORMS)
    return (
        has_expected_forward
        and isinstance(norm, FOLDABLE_NORMS)
        and not is_hooked(norm)
        and not norm.training
        and norm.running_mean is not None
        and isinstance(getattr(norm, "drop", None), (nn.Identity, nn.Dropout, type(None)))
    )


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Two tensors (n,) in float64 with norm(x) = scale * x + shift in eval mode."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


@torch.no_grad()
def fold_conv(layer: nn.Conv2d, norm: nn.Module | None, activation: Activation) -> FoldedConv:
    """Fold a norm into a conv, Lego or dense; the conv itself is not changed.

    In a Lego layer the scale goes into the coefficients, since each of them belongs to one output
    channel; in a dense layer it goes into the weight. The shift goes into the bias.
    """
    scale = None
    bias = None if layer.bias is None else layer.bias.detach()
    if norm is not None:
        scale, shift = scale_and_shift(norm)
        bias = shift if bias is None else shift + bias.double() * scale
    if isinstance(layer, LegoModule):
        shape, index = layer.lego_shape, layer.index
        filters: Tensor = layer.lego_filters
        coefficients = _scaled_coefficients(layer, scale)
    else:
        coefficients, filters = None, layer.weight
        n_out, channels, kh, kw = filters.shape
        shape = UnitShape(n_out, channels, (kh, kw), layer.groups, n_out, 1, 1)
        index = torch.arange(n_out, device=filters.device).reshape(1, n_out, 1)
        if scale is not None:
            filters = (filters.double() * scale[:, None, None, None]).to(filters.dtype)
    return FoldedConv(
        shape=shape,
        unit=LegoUnit(filters.detach().contiguous(), index, coefficients),
        bias=None if bias is None else bias.to(filters.dtype),
        geometry=Geometry.of(layer),
        activation=activation,
        is_lego=isinstance(layer, LegoModule),
        layer=layer,
        norm=norm,
    )


def _scaled_coefficients(layer: LegoModule, scale: Tensor | None) -> Tensor | None:
    """The coefficients (o, n, k) times the scale (n,) of their output channels."""
    coefficients = None if layer.coefficients is None else layer.coefficients.detach()
    if scale is None:
        return coefficients
    scaled = scale[:, None].expand(layer.index.shape)
    if coefficients is not None:
        scaled = scaled * coefficients.double()
    return scaled.to(layer.lego_filters.dtype).contiguous()
