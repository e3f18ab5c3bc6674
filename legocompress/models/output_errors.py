"""How far the outputs of a compressed network are from the original's, in what decides.

Classifiers often add one large number to all logits of an image, which decides nothing. An error
relative to raw logits is small only because this number is large. The errors here leave it out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.errors import DataError
from legocompress.models.outputs import find_logits, flatten_float_tensors

TINY = 1e-30


@dataclass(frozen=True)
class OutputErrors:
    """The errors of a network's outputs y' against the original's outputs y.

    The last three are None where there are no logits (N, classes). A single class decides nothing,
    so then `logits` and `divergence` are None, too.

    Attributes:
        images: number of images.
        relative: ||y - y'|| / ||y|| of all floating-point tensors in the outputs.
        logits: ||z - z'|| / ||z|| of the logits, where z is y minus its mean over the classes.
        divergence: mean of KL(softmax(y) || softmax(y')) over the images, in nats.
        agreement: percentage of the images with the same first class.
    """

    images: int
    relative: float
    logits: float | None
    divergence: float | None
    agreement: float | None

    @property
    def deciding(self) -> float:
        """The error by which networks are compared: of the centred logits, else `relative`."""
        return self.relative if self.logits is None else self.logits


class OutputComparison:
    """Sums over batches of outputs of two networks, from which the errors follow."""

    def __init__(self) -> None:
        self._images = self._same = 0
        self._error = self._energy = 0.0
        self._logit_error = self._logit_energy = self._divergence = 0.0
        self._n_classes: int | None = None  # until the first batch; 0 without logits

    def add(self, output: Any, target: Any, n_images: int) -> None:
        """Add one batch.

        Args:
            output: of the compressed network, of any structure.
            target: of the original.
            n_images: number of images in the batch.

        Raises:
            DataError: the two outputs hold tensors of different shapes.
        """
        outputs, targets = flatten_float_tensors(output), flatten_float_tensors(target)
        _check_same_shapes(outputs, targets)
        for ours, theirs in zip(outputs, targets, strict=True):
            self._error += float((theirs.double() - ours).square().sum())
            self._energy += float(theirs.double().square().sum())
        self._images += n_images
        ours_logits, logits = find_logits(output, n_images), find_logits(target, n_images)
        if ours_logits is None or logits is None:
            self._n_classes = 0
        elif self._n_classes != 0:
            self._n_classes = logits.shape[1]
            self._add_logits(ours_logits.double(), logits.double())

    def _add_logits(self, output: Tensor, target: Tensor) -> None:
        ours, theirs = output.log_softmax(1), target.log_softmax(1)
        self._divergence += float((theirs.exp() * (theirs - ours)).sum())
        self._same += int((output.argmax(1) == target.argmax(1)).sum())
        centred = target - target.mean(1, keepdim=True)
        difference = centred - (output - output.mean(1, keepdim=True))
        self._logit_error += float(difference.square().sum())
        self._logit_energy += float(centred.square().sum())

    def compute(self) -> OutputErrors:
        """Compute the errors over all batches."""
        n_classes, images = self._n_classes or 0, max(self._images, 1)
        return OutputErrors(
            images=self._images,
            relative=_root(self._error, self._energy),
            logits=_root(self._logit_error, self._logit_energy) if n_classes > 1 else None,
            divergence=self._divergence / images if n_classes > 1 else None,
            agreement=100 * self._same / images if n_classes else None,
        )


def _root(error: float, energy: float) -> float:
    return float((error / max(energy, TINY)) ** 0.5)


@torch.no_grad()
def compare_outputs(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Tensor],
) -> OutputErrors:
    """Run two networks, both in eval mode, on batches (N, c, H, W) and compare their outputs.

    Raises:
        DataError: the two outputs hold tensors of different shapes.
    """
    comparison = OutputComparison()
    for images in batches:
        comparison.add(model(images), original(images), len(images))
    return comparison.compute()


def _check_same_shapes(outputs: list[Tensor], targets: list[Tensor]) -> None:
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (targets, outputs)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"the original returns tensors of shapes {shapes[0]} and the converted network "
            f"{shapes[1]}, so their outputs cannot be compared; name the network that it was "
            "converted from, or compare parts of the networks that return feature maps"
        )
