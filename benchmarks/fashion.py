"""Fashion-MNIST for benchmarks: images by seed, two networks of unlike shape, sizes of layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_demo import (
    CLASSES,
    MEAN,
    N_VALIDATION,
    STD,
    Bytes,
    accuracy,
    read_split,
    timm_inputs,
    train_,
)

import legocompress as lego

SHIPPED = Path(lego.__file__).parent / "demo" / "fashion-resnet"
NETWORKS = ("shipped", "vgg")
SIZED = ("uniform", "bytes", "macs", "both")  # m, o, k as told, or by layer within those costs
POOL = 0
VGG = (16, POOL, 48, 48, POOL, 96, 96, POOL, 128, 128)  # output channels of each conv
VGG_SIDE = 28


class Vgg(nn.Module):
    """A chain of conv, BatchNorm and ReLU with pooling between; no residuals. 0.41M parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in VGG:
            if width == POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, len(CLASSES))
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (1, VGG_SIDE, VGG_SIDE),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": (MEAN,),
            "std": (STD,),
            "first_conv": "features.0",
            "classifier": "classifier",
        }

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, 10) of images (N, 1, 28, 28)."""
        scores: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return scores


@dataclass(frozen=True)
class Task:
    """A network, unlabelled images (N, 28, 28) to draw from, and the test split as its inputs."""

    network: nn.Module
    unlabelled: Bytes
    inputs: Tensor
    labels: Tensor

    def images(self, n_images: int, seed: int) -> Tensor:
        """Draw training images that training did see and validation did not, as inputs."""
        chosen = np.random.default_rng(seed).choice(len(self.unlabelled), n_images, replace=False)
        return timm_inputs(self.network, self.unlabelled[chosen])

    @cached_property
    def dense_accuracy(self) -> float:
        """Of the network itself."""
        return self.accuracy(self.network)

    def accuracy(self, network: nn.Module) -> float:
        """Percentage of the test images that a network labels rightly."""
        return accuracy(network, self.inputs, self.labels)


def load(name: str, data_dir: Path, cache: Path, epochs: int) -> Task:
    """The task of one of the two networks; the second is trained where `cache` is no file yet."""
    shipped = name == "shipped"
    network = lego.create(f"local-dir:{SHIPPED}") if shipped else vgg(data_dir, cache, epochs)
    images, labels = read_split(data_dir, "t10k")
    return Task(
        network.eval(),
        read_split(data_dir, "train")[0][:-N_VALIDATION],
        timm_inputs(network, images),
        torch.from_numpy(labels.astype(np.int64)),
    )


def sized(
    network: nn.Module, spec: lego.LegoSpec, kind: str, terms: int | None = None
) -> lego.LegoSpec:
    """The spec as it is, or m, o and k by layer within what it costs, as `SIZED` tells.

    `terms` is the most of k; by default that of the spec.
    """
    if kind == "uniform":
        return spec
    costs = lego.measure(lego.convert_(copy.deepcopy(network), lego.plan(network, spec))).totals()
    return lego.allocate(
        network,
        spec.model_copy(update={"k": terms or spec.k}),
        max_size=None if kind == "macs" else costs["bits"] / costs["dense_bits"],
        max_macs=None if kind == "bytes" else costs["macs_used_only"] / costs["dense_macs"],
    )


def vgg(data_dir: Path, cache: Path, epochs: int) -> nn.Module:
    """The second network, trained on the first 55,000 training images, or as `cache` holds it."""
    torch.manual_seed(0)
    network = Vgg().to(memory_format=torch.channels_last)
    if cache.is_file():
        network.load_state_dict(load_file(cache))
        return network
    images, labels = read_split(data_dir, "train")
    pixels, classes = torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
    split = len(pixels) - N_VALIDATION
    print(f"training the second network into {cache}", flush=True)
    train_(
        network,
        (pixels[:split], classes[:split]),
        (pixels[split:], classes[split:]),
        epochs,
        seed=0,
    )
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, cache)
    return network
