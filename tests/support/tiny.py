"""A network, images and a recipe so small that training them takes no time."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import legocompress as lego

ARCHITECTURE = "resnet18"
ARGS: dict[str, Any] = {"channels": [8, 8, 8, 16], "layers": [1, 1, 1, 1]}
CLASSES = 3
SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
RECIPE: dict[str, Any] = {
    "data": {"holdout": 12},
    "augment": {"crop": "shift", "padding": 2},
    "batch_size": 8,
    "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-3},
    "stages": [{"epochs": 2, "rates": {"proxies": 100.0}}],
}


def dense(**create: Any) -> nn.Module:
    """A ResNet of 16x16 grey images and 3 classes, of random weights."""
    return lego.create(
        ARCHITECTURE,
        pretrained=False,
        num_classes=CLASSES,
        in_chans=1,
        model_args=ARGS,
        preprocess={"input_size": (16, 16), "mean": (0.5,), "std": (0.25,), "crop_pct": 1.0},
        **create,
    )


def compressed(**spec: Any) -> nn.Module:
    """The same network with all its convs but the stem as Lego modules."""
    return copy.deepcopy(_compressed(**spec))


@lru_cache
def _compressed(**spec: Any) -> nn.Module:
    model = dense()
    wanted = lego.LegoSpec(**{"m": 0.5, "o": 2, "allow_expansion": True, **spec})
    return lego.convert_(model, lego.plan(model, wanted))


def recipe(**changes: Any) -> lego.Recipe:
    """The recipe above, with blocks replaced."""
    return lego.Recipe(**{**RECIPE, **changes})


def write_images(path: Path, number: int = 52, labels: bool = True, test: int = 0) -> Path:
    """An .npz of grey 16x16 images whose class is where they are bright."""
    generator = np.random.default_rng(0)
    classes = np.arange(number) % CLASSES
    pixels = generator.integers(0, 120, (number, 16, 16), dtype=np.uint8)
    for image, label in zip(pixels, classes, strict=True):
        image[5 * label : 5 * label + 5] += 120
    arrays: dict[str, Any] = {"images": pixels}
    if labels:
        arrays["labels"] = classes
    if test:
        arrays["test"] = np.arange(number) >= number - test
    np.savez(path, **arrays)
    return path


def small(**args: Any) -> nn.Module:
    """A narrow ResNet of colour images and 5 classes."""
    args = {"pretrained": False, "num_classes": 5, "model_args": SMALL, **args}
    return lego.create("resnet18", **args)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same state, in the same order."""
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)
