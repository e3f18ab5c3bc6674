"""What the tests of calibration share: the shipped network, its images, and odd networks."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

import legocompress as lego
from legocompress.calibrate.calibration import gather

DEMO = Path(str(files("legocompress") / "demo"))
NAME = f"local-dir:{DEMO / 'fashion-resnet'}"


def demo_images(n_images: int) -> Tensor:
    network = lego.create(NAME)
    images = lego.open_images(str(DEMO / "fashion-calibration.npz"), network, labels=False)
    return gather(images.batches(64), n_images)


def converted(network: nn.Module, **spec: Any) -> nn.Module:
    student = copy.deepcopy(network)
    return lego.convert_(student, lego.plan(student, lego.LegoSpec(**spec)))


class Twice(nn.Module):
    """One conv called twice, a skip over all of it, and a branch that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        y = self.shared(self.shared(first).relu_()).relu_()
        return torch.as_tensor((self.last(y) + first).mean((2, 3)))


class Odd(nn.Module):
    """Grouped, strided, standardised, shared and linear layers, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2)
        self.standard = StdConv2d(32, 24, 3, padding=1, bias=False)
        self.same = Conv2dSame(24, 32, 3, stride=2)
        self.shared = nn.Conv2d(32, 32, 1, bias=False)
        self.unused = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standard(self.grouped(self.stem(x).relu()).relu()).relu()
        x = self.same(x)
        x = x + self.shared(self.shared(x).relu())
        return torch.as_tensor(self.head(x.mean((2, 3))))
