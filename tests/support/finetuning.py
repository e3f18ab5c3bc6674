"""Train the tiny network, and load its training images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import legocompress as lego
from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loop import finetune_
from legocompress.finetune.training_data import open_training
from legocompress.finetune.training_loader import TrainingLoader
from tests.support.tiny import recipe

Batches = list[tuple[Tensor, Tensor]]


def train(
    model: nn.Module, images: Path, changes: dict[str, Any], **options: Any
) -> tuple[nn.Module, list[Epoch]]:
    """Fine-tune by the tiny recipe with some blocks replaced; return the network and its epochs."""
    settings = recipe(**changes)
    epochs: list[Epoch] = []
    data = lego.open_training(model, settings, str(images))
    finetune_(model, settings, *data, on_epoch=epochs.append, **options)
    return model, epochs


def compute_outputs(model: nn.Module) -> Tensor:
    """The logits (4, 3) of four images of noise, always the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.randn(4, 1, 16, 16, generator=generator))  # type: ignore[no-any-return]


def make_loader(
    model: nn.Module,
    place: Path,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    **changes: Any,
) -> TrainingLoader:
    """The training loader of the tiny recipe with some blocks replaced."""
    settings = recipe(**changes)
    images, _ = open_training(model, settings, str(place))
    return TrainingLoader(images, model, settings, rank, processes, workers)


def load_batches(loader: TrainingLoader, epoch: int = 0, start: int = 0) -> Batches:
    """All images and labels of an epoch from update `start` on."""
    return [(x, y) for x, y in loader.parts(epoch, start)]


def are_equal(a: Batches, b: Batches) -> bool:
    """Whether two lists of batches hold the same images and labels."""
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def write_grey_image(path: Path, value: int) -> None:
    """Write a 16x16 image of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 16), value).save(path)
