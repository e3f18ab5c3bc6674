"""A small network with many kinds of convs, and ways to convert it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from legocompress.compress.convert import convert_
from legocompress.compress.planning import plan
from legocompress.lego.module import LegoModule
from legocompress.spec import LegoSpec

IMAGE = torch.zeros(1, 3, 12, 12)


NAMES = ["3", "6", "7", "10"]


def randomised(model: nn.Module) -> nn.Module:
    """Give norms random parameters and statistics: ones and zeros would hide wrong weights."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def small_cnn() -> nn.Sequential:
    """Strided, grouped, dilated and 1x1 convs; `o` = 4 divides not all of their channels."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 20, 3, padding=1, groups=2),
        nn.Conv2d(20, 10, (3, 1), padding="same", dilation=2, padding_mode="reflect"),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    randomised(model)
    return model


def converted(model: nn.Module, seed: int = 0, image: Any = IMAGE, **settings: Any) -> nn.Module:
    return convert_(model, plan(model, LegoSpec(**settings), image), seed)


def lego(model: nn.Module, name: str) -> Any:
    layer = model.get_submodule(name)
    assert isinstance(layer, LegoModule)
    return layer


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)
