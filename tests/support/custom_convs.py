"""Layers that change the computation elsewhere than in a `forward` of their class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class PanoramaConv(nn.Conv2d):
    """Pads columns in a circle and rows with zeros, in `_conv_forward`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input = F.pad(F.pad(input, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return F.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)


class CentredConv(nn.Conv2d):
    """Takes the mean out of each filter, in `_conv_forward`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class ScaledCallConv(nn.Conv2d):
    """Scales its input in `__call__`."""

    def __call__(self, x: Tensor) -> Any:
        return super().__call__(2 * x)


class ShiftedLinear(nn.Linear):
    """Shifts its output in `_call_impl`."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return super()._call_impl(*args, **kwargs) + 0.5


class NamedConv(nn.Conv2d):
    """Has a constructor and a method of its own, but computes as nn.Conv2d."""

    def __init__(self, c: int, n: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(c, n, *args, **kwargs)
        self.made_by = "tests"

    def describe(self) -> str:
        return f"{self.made_by}: {self.kernel_size}"


def doubled(layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return 2 * nn.Conv2d._conv_forward(layer, input, weight, bias)


def halved(layer: nn.Conv2d, input: Tensor) -> Tensor:
    return 0.5 * type(layer).forward(layer, input)


def replace(method: str, function: Callable[..., Tensor]) -> nn.Conv2d:
    """A conv with a method replaced on the instance."""
    layer = nn.Conv2d(6, 8, 3, padding=1)
    layer.__dict__[method] = partial(function, layer)
    return layer


# By name: a layer of 6 inputs and 8 outputs; convs keep the size of the map.
CUSTOM_CONVS: dict[str, Callable[[], nn.Module]] = {
    "conv forward": lambda: PanoramaConv(6, 8, 3),
    "weight": lambda: CentredConv(6, 8, 3, padding=1),
    "call": lambda: ScaledCallConv(6, 8, 3, padding=1),
    "instance conv forward": lambda: replace("_conv_forward", doubled),
    "instance forward": lambda: replace("forward", halved),
}
