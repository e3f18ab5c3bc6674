"""The targets of a batch: checked labels, mixed with their images if the recipe says so."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor, nn

from legocompress.finetune.distill import check_labels, take_logits
from legocompress.finetune.recipe import Recipe
from legocompress.models.probe import evaluating


class Targets:
    """Prepares the targets of batches; learns the number of outputs from the first one."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.n_outputs: int | None = None
        self.mixup: Mixup | None = None

    def check(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the labels (N,), or zeros if the recipe does not read them.

        Raises:
            DataError: the outputs are not (N, classes), or a label is not among the classes.
        """
        if self.n_outputs is None:
            self.n_outputs = count_outputs(model, images)
            self.mixup = _create_mixup(self.recipe, self.n_outputs)
        if not self.recipe.uses_labels:
            return torch.zeros_like(labels)
        check_labels(images.new_empty(0, self.n_outputs), labels, True)
        return labels

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images with images, and their targets to (N, classes); unchanged without mixup."""
        if self.mixup is None:
            return images, targets
        return self.mixup(images, targets)  # type: ignore[no-any-return]


def count_outputs(model: nn.Module, images: Tensor) -> int:
    """The number of classes of a network, from its output for the first image.

    Raises:
        DataError: no tensor of its output is surely the logits.
    """
    with evaluating(model):
        output = model(images[:1])
    return int(take_logits(output, 1).shape[1])


def _create_mixup(recipe: Recipe, n_outputs: int) -> Mixup | None:
    settings = recipe.mixup
    if settings is None:
        return None
    return Mixup(
        settings.mixup,
        settings.cutmix,
        prob=settings.prob,
        switch_prob=settings.switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=n_outputs,
    )
