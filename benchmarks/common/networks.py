"""Pretrained networks by the names of their weights files, and random values for the others."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

import legocompress as lego
from benchmarks.common.arguments import parse_folder

SQUEEZENET = {
    "mean": (123.68 / 255, 116.779 / 255, 103.939 / 255),
    "std": (1 / 255, 1 / 255, 1 / 255),
}


@dataclass(frozen=True)
class Architecture:
    """Where a network comes from; `n_outputs` only where its outputs are not ImageNet's classes."""

    name: str
    n_outputs: int | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    "squeezenet1_1": Architecture("torchvision/squeezenet1_1", preprocess=SQUEEZENET),
    "mobilenet_v2": Architecture("torchvision/mobilenet_v2"),
    "tf_efficientnet_lite0": Architecture("timm/tf_efficientnet_lite0"),
    "resnet50_embed768": Architecture("timm/resnet50", 768),
}
FEATURES = "vgg16_features"  # the convs of torchvision's VGG-16 alone
NETWORKS = (*ARCHITECTURES, FEATURES)


def open_network(name: str, folder: Path) -> nn.Module:
    """One of `NETWORKS` with the weights of FOLDER/NAME.safetensors."""
    return open_weights(name, folder / f"{name}.safetensors")


def open_weights(name: str, path: Path) -> nn.Module:
    """One of `NETWORKS` with the weights of a file."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: it should hold the weights of {name}")
    if name == FEATURES:
        return _open_features(path)
    chosen = ARCHITECTURES[name]
    return lego.create(
        chosen.name, path, num_classes=chosen.n_outputs, preprocess=chosen.preprocess
    )


def _open_features(path: Path) -> nn.Module:
    network: Any = make_layers(cfgs["D"])
    network.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    network.pretrained_cfg = {"input_size": (3, 224, 224), "first_conv": "0", **SQUEEZENET}
    features: nn.Module = network
    return features


def add_weights_folder(parser: argparse.ArgumentParser, required: bool, text: str) -> None:
    """Add `--weights-dir`."""
    parser.add_argument("--weights-dir", type=parse_folder, required=required, help=text)


def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Give values to parameters and statistics that are constant after initialisation."""
    generator = torch.Generator().manual_seed(seed)

    def draw_noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * draw_noise(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * draw_noise(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(1 + 0.2 * draw_noise(buffer).clamp(-2, 2))
