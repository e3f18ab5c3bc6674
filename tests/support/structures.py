"""Outputs of many kinds, and a network that returns what a function makes of its maps."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

import legocompress as lego

Make = Callable[[Tensor, Tensor], Any]


@dataclass
class Result:
    """A plain dataclass."""

    logits: Any
    more: Any = None


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """A dataclass that is an ordered dict of its fields that are not None, as in transformers."""

    loss: Any = None
    logits: Any = None
    maps: Any = None

    def __post_init__(self) -> None:
        for name in ("loss", "logits", "maps"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Pair(NamedTuple):
    """A named tuple."""

    maps: Any
    others: Any


class Structured(nn.Module):
    """Two convs, whose maps and means a function puts into a structure."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.first, self.second, self.make = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), make

    def forward(self, x: Tensor) -> Any:
        y = self.second(self.first(x).relu())
        return self.make(y, y.mean((2, 3)))


class TwoInputs(nn.Module):
    """A network of two images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.second((self.first(x) - self.first(2 * y)).relu())


def converted(network: nn.Module, example: Any) -> nn.Module:
    """A converted copy in eval mode."""
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    copied = copy.deepcopy(network).eval()
    return lego.convert_(copied, lego.plan(copied, spec, example))
