"""What the tests of measurements share: a small network, and how to convert it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import legocompress as lego

IMAGE = torch.zeros(1, 3, 8, 8)


def make_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def convert(model: nn.Module, image: Tensor = IMAGE, **settings: Any) -> nn.Module:
    return lego.convert_(model, lego.plan(model, lego.LegoSpec(**settings), image))
