"""What the tests of benchmarking share: a small network."""

from __future__ import annotations

from typing import Any

import torch

import legocompress as lego

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
IMAGE = torch.zeros(1, 3, 32, 32)


def network(**args: Any) -> torch.nn.Module:
    model = lego.create("resnet18", pretrained=False, num_classes=10, model_args={**SMALL, **args})
    plan = lego.plan(model, lego.LegoSpec(m=0.5, o=2, allow_expansion=True), IMAGE)
    return lego.convert_(model, plan)
