"""Networks on Fashion-MNIST: the shipped one and a VGG-like one, with data and test accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.fashion_mnist import (
    CLASSES,
    MEAN,
    N_VALIDATION,
    STD,
    Bytes,
    measure_accuracy,
    prepare_inputs,
    read_split,
    split_validation,
    train_,
)

SHIPPED = Path(lego.__file__).parent / "demo" / "fashion-resnet"
NETWORKS = ("shipped", "vgg")
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
    """A network, unlabelled images (N, 28, 28), and the test split as the network's inputs."""

    network: nn.Module
    unlabelled: Bytes
    inputs: Tensor
    labels: Tensor

    def draw_images(self, n_images: int, seed: int) -> Tensor:
        """Training images at random, none of them used for validation, as inputs."""
        chosen = np.random.default_rng(seed).choice(len(self.unlabelled), n_images, replace=False)
        return prepare_inputs(self.network, self.unlabelled[chosen])

    @cached_property
    def dense_accuracy(self) -> float:
        """Test accuracy of the network itself, in percent."""
        return self.measure_accuracy(self.network)

    def measure_accuracy(self, network: nn.Module) -> float:
        """Percentage of the test images that a network classifies correctly."""
        return measure_accuracy(network, self.inputs, self.labels)


def create_shipped() -> nn.Module:
    """The network that ships with the package."""
    return lego.create(f"local-dir:{SHIPPED}")


def open_task(name: str, data_dir: Path, cache: Path, epochs: int) -> Task:
    """The task of one of `NETWORKS`; the VGG-like one is trained where `cache` does not exist."""
    network = create_shipped() if name == "shipped" else open_vgg(data_dir, cache, epochs)
    images, labels = read_split(data_dir, "t10k")
    return Task(
        network.eval(),
        read_split(data_dir, "train")[0][:-N_VALIDATION],
        prepare_inputs(network, images),
        torch.from_numpy(labels.astype(np.int64)),
    )


def open_vgg(data_dir: Path, cache: Path, epochs: int) -> nn.Module:
    """The VGG-like network: read from `cache`, or trained on 55,000 images and written there."""
    torch.manual_seed(0)
    network = Vgg().to(memory_format=torch.channels_last)
    if cache.is_file():
        network.load_state_dict(load_file(cache))
        return network
    images, labels = read_split(data_dir, "train")
    train, validation = split_validation(torch.from_numpy(images.copy()), labels)
    print(f"training the VGG-like network into {cache}", flush=True)
    train_(network, train, validation, epochs, seed=0)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, cache)
    return network
