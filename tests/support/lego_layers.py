"""Lego modules of random filters, beside the dense layer of the same weight."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from legocompress.lego.module import LegoModule
from legocompress.lego.shape import UnitShape
from legocompress.lego.surgery import become_lego_
from legocompress.lego.unit import LegoUnit

Layer = nn.Conv2d | nn.Linear


def lego_(
    layer: Layer, n_split: int = 2, n_lego: int = 3, n_terms: int = 1, coefficients: bool = True
) -> LegoModule:
    """Turn a layer into a Lego module of random filters."""
    linear = isinstance(layer, nn.Linear)
    n_out, channels = layer.weight.shape[:2]
    kernel = (1, 1) if linear else (layer.weight.shape[2], layer.weight.shape[3])
    groups = 1 if linear else layer.groups
    shape = UnitShape(n_out, channels, kernel, groups, n_lego, n_split, n_terms)
    slots = (n_split, n_out, n_terms)
    filters = torch.randn(n_lego, shape.width, *kernel, dtype=torch.float64)
    index = torch.randint(n_lego, slots)
    gains = torch.randn(slots, dtype=torch.float64) if coefficients else None
    return become_lego_(layer, shape, LegoUnit(filters, index, gains))


def twins(layer: Layer, **unit: Any) -> tuple[Layer, Any]:
    """The same layer twice: dense with the assembled weight, and as a Lego module."""
    dense = copy.deepcopy(layer)
    module = lego_(layer, **unit)
    with torch.no_grad():
        dense.weight.copy_(module.weight)
    return dense, module


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs, dtype=torch.float64)  # type: ignore[misc]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def by_route(module: LegoModule, route: str, x: Tensor) -> Tensor:
    module.route = route  # type: ignore[assignment]
    try:
        return module(x)
    finally:
        module.route = "assemble"


STANDARDISED = [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]
