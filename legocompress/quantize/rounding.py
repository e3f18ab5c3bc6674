"""Rounding the weights of layers to the int8 grid, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from legocompress.lego.module import LegoModule
from legocompress.lego.storage import round_to_storage


@torch.no_grad()
def round_layers_(layers: Iterable[nn.Module]) -> None:
    """Round the filters of layers to int8 times one scale per filter, or per output channel."""
    for layer in layers:
        if isinstance(layer, LegoModule):
            layer.synchronise_index()
            layer.frozen_weight = None
            layer.storage_dtype = "int8"
            layer.lego_filters.copy_(round_to_storage(layer.lego_filters, "int8"))
            if layer.coefficients is not None:
                dtype = layer.coefficients_dtype
                layer.coefficients.copy_(round_to_storage(layer.coefficients, dtype))
        else:
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            weight.copy_(round_to_storage(weight, "int8"))


@torch.no_grad()
def round_norms_(norms: Iterable[nn.Module]) -> None:
    """Round the values of norms to fp16, tensor by tensor, where it holds them to 11 bits."""
    for norm in norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = getattr(norm, name, None)
            if isinstance(values, Tensor):
                rounded = values.half().float()
                if bool(((rounded - values).abs() <= values.abs() * 2.0**-11).all()):
                    values.copy_(rounded)


@torch.no_grad()
def is_rounded(layer: nn.Module | None) -> bool:
    """Whether the filters of a layer lie on the int8 grid; so do those of no layer."""
    if layer is None:
        return True
    filters = layer.lego_filters if isinstance(layer, LegoModule) else layer.weight
    assert isinstance(filters, torch.Tensor)
    return torch.equal(round_to_storage(filters, "int8"), filters)
