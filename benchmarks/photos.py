"""Pretrained networks and views of photos for the calibration benchmark."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

import legocompress as lego
from legocompress.calibrate.crops import random_crop
from legocompress.calibrate.joint import agreement, output_error
from legocompress.models.probe import evaluating

UNSEEN = 3  # one photo in so many is never calibrated on
BATCH = 32
SQUEEZENET = {
    "mean": (123.68 / 255, 116.779 / 255, 103.939 / 255),
    "std": (1 / 255, 1 / 255, 1 / 255),
}
# Name of the weights file: architecture, number of outputs that are no classes, preprocessing.
ARCHITECTURES: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "squeezenet1_1": ("torchvision/squeezenet1_1", None, SQUEEZENET),
    "mobilenet_v2": ("torchvision/mobilenet_v2", None, {}),
    "tf_efficientnet_lite0": ("timm/tf_efficientnet_lite0", None, {}),
    "resnet50_embed768": ("timm/resnet50", 768, {}),
}
FEATURES = "vgg16_features"  # the convs of torchvision's VGG-16 alone
NETWORKS = (*ARCHITECTURES, FEATURES)


def open_network(name: str, folder: Path, file: str | None = None) -> nn.Module:
    """One of `NETWORKS` with the weights of its file."""
    path = folder / (file or f"{name}.safetensors")
    if name == FEATURES:
        return _features(path)
    architecture, outputs, preprocess = ARCHITECTURES[name]
    return lego.create(architecture, path, num_classes=outputs, preprocess=preprocess)


def _features(path: Path) -> nn.Module:
    network: Any = make_layers(cfgs["D"])
    network.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    network.pretrained_cfg = {"input_size": (3, 224, 224), "first_conv": "0", **SQUEEZENET}
    checked: nn.Module = network
    return checked


def views(
    network: nn.Module, folder: Path, n_views: int, seed: int, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Random crops of photos to calibrate on, and half as many of other photos.

    Args:
        network: whose preprocessing is used.
        folder: of photos, .jpg.
        n_views: how many to calibrate on.
        seed: of the crops.
        whole: calibrate on all photos; there are no others then.
    """
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise SystemExit(f"no .jpg in {folder}")
    transform = random_crop(create_transform(**resolve_data_config({}, model=network)))
    unseen = [] if whole else paths[UNSEEN - 1 :: UNSEEN]
    seen = [path for path in paths if path not in unseen]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        both = [
            [_view(chosen[n % len(chosen)], transform) for n in range(count)]
            for chosen, count in ((seen, n_views), (unseen, n_views // 2 if unseen else 0))
        ]
    return torch.stack(both[0]), torch.stack(both[1]) if both[1] else torch.empty(0)


def _view(path: Path, transform: Any) -> Tensor:
    with Image.open(path) as image:
        view: Tensor = transform(image.convert("RGB"))
    return view


def agreement_rows(
    network: nn.Module, spec: lego.LegoSpec, seen: Tensor, unseen: Tensor, epochs: int, seed: int
) -> dict[str, Any]:
    """Convert and calibrate a copy; its outputs on unseen views before and after, and its layers.

    Agreement is of the first class; None where the outputs are no classes.
    """
    student = copy.deepcopy(network)
    lego.convert_(student, lego.plan(student, spec), seed)
    classes = _classifies(network)
    batches = torch.split(unseen, BATCH)

    def judge(when: str) -> dict[str, float | None]:
        with evaluating(student), evaluating(network):
            same = partial(agreement, student, network, batches)
            return {
                f"error_{when}": output_error(student, network, batches),
                f"agreement_{when}": same() if classes else None,
            }

    before = judge("before")
    record = lego.calibrate_(student, network, seen, seed=seed, epochs=epochs)
    layers = [row.model_dump() for row in record.layers]
    sizes = {"n_seen": len(seen), "n_unseen": len(unseen)}
    return {**sizes, **before, **judge("after"), "norms": record.norms, "layers": layers}


def _classifies(network: nn.Module) -> bool:
    """Whether the outputs are the thousand classes of ImageNet."""
    image = torch.zeros(1, 3, 224, 224)
    with evaluating(network):
        return bool(network(image).shape[1] == 1000)
