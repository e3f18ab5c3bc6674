"""How far training has come, and the sums over an epoch from which that is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from legocompress.lego.module import lego_modules


@dataclass(frozen=True)
class Progress:
    """How far training has come; loss and top-1 are means over the epoch so far.

    `changed` counts the entries of all indices that differ from the epoch's start. `top1` is a
    percentage on images before mixing, None where the labels are not read. `epoch` counts from 1.
    """

    epoch: int
    epochs: int
    update: int
    updates: int
    loss: float
    top1: float | None
    images_per_second: float
    changed: int
    lr: float


class EpochMeter:
    """Sums over the images of an epoch so far, and the indices at its start.

    Attributes:
        sums: (3,) float64: loss times images, correctly classified images, images.
        start_indices: the index (o, n, k) of every Lego layer, by name.
    """

    def __init__(self, model: nn.Module):
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.start_indices = copy_indices(model)

    def add(self, loss: Tensor, n_correct: Tensor, n_images: int) -> None:
        """Add a batch: its mean loss, and how many of its images were classified correctly."""
        batch_sums = [
            loss.detach().double() * n_images,
            n_correct.double(),
            n_correct.new_tensor(n_images).double(),
        ]
        self.sums = self.sums.to(loss.device) + torch.stack(batch_sums)

    def count_changed_entries(self, model: nn.Module) -> int:
        """Count the entries of all indices that differ from the epoch's start."""
        return count_changed_entries(model, self.start_indices)


def copy_indices(model: nn.Module) -> dict[str, Tensor]:
    """Copy the index (o, n, k) of every Lego layer, by name."""
    return {name: module.index.clone() for name, module in lego_modules(model)}


def count_changed_entries(model: nn.Module, start_indices: dict[str, Tensor]) -> int:
    """Count the entries of all indices that differ from what `copy_indices` returned earlier."""
    total = 0
    for name, module in lego_modules(model):
        module.synchronise_index()
        start = start_indices[name].to(module.index.device)
        total += int((module.index != start).sum())
    return total
