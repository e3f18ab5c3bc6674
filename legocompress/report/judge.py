"""Photos that int8 forms are calibrated with, and others that every form is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset

from legocompress.data.evaluation import evaluate
from legocompress.data.images import Images, open_images
from legocompress.errors import DataError, UsageError
from legocompress.models.outputs import describe_output, find_logits
from legocompress.models.probe import evaluating

FEWEST_PHOTOS = 8
MOST_PHOTOS = 300  # to calibrate with, which NNCF takes by default; and as many to judge by
HELD_OUT = 4  # one photo of this many judges
BATCH = 16

Predict = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Score:
    """How good one form is; percentages, and `top1` is None without labelled images.

    `agreement` is the share of the held-out photos with the first class of the original network.
    `output_error` is the relative error ||y - y'|| / ||y|| of their logits.
    """

    agreement: float
    output_error: float
    top1: float | None


@dataclass(frozen=True)
class Judge:
    """The original network, and the photos that forms are calibrated with and judged by.

    No photo of `held_out` is in `calibration`. `cache` keeps quantised networks, which depend on
    nothing but this.
    """

    original: nn.Module
    calibration: Images
    held_out: Images
    labelled: Images | None
    cache: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def original_score(self) -> Score:
        """The score of the original network, whose agreement is 100."""
        return self.score(self.original, BATCH)

    @cached_property
    def _original_logits(self) -> Tensor:
        with evaluating(self.original):
            return torch.cat(list(self._list_logits(self.original, BATCH)))

    def score(self, predict: Predict, batch: int) -> Score:
        """Score a form that runs on batches of exactly `batch` images.

        Raises:
            DataError: labels do not fit the outputs, or an image cannot be read.
            UsageError: there is no output (N, classes).
        """
        expected = self._original_logits
        with torch.no_grad():
            logits = torch.cat(list(self._list_logits(predict, batch)))
        top1 = None
        if self.labelled is not None:
            top1 = evaluate(
                _AsModule(predict, batch),
                self.labelled.batches(batch),
                n_classes=self.labelled.n_classes,
            ).top1
        return Score(
            100 * int((logits.argmax(1) == expected.argmax(1)).sum()) / len(expected),
            float((logits - expected).norm() / expected.norm()),
            top1,
        )

    def _list_logits(self, predict: Predict, batch: int) -> Iterator[Tensor]:
        """Yield the logits (N, classes) of the held-out photos."""
        for images, _ in self.held_out.batches(batch):
            output = _predict_padded(predict, images, batch)
            logits = find_logits(output, len(images))
            if logits is None:
                raise UsageError(
                    f"the network's output is {describe_output(output)}; accuracy needs one tensor "
                    "(N, classes); leave out the photos to measure speed only"
                )
            yield logits.float()


class _AsModule(nn.Module):
    """A form as a module, as `evaluate` takes it."""

    def __init__(self, predict: Predict, batch: int):
        super().__init__()
        self.predict, self.batch = predict, batch
        self.device_holder = nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Any:
        return _predict_padded(self.predict, x, self.batch)


def _predict_padded(predict: Predict, images: Tensor, batch: int) -> Any:
    """Run a form on up to `batch` images, filled up to a whole batch with the same images."""
    n = len(images)
    output = predict(images[torch.arange(batch) % n] if n < batch else images)
    logits = find_logits(output, batch)
    return output if logits is None else logits[:n]


def open_judge(
    original: nn.Module, data: str, labelled: str | None = None, class_map: str | None = None
) -> Judge:
    """Open photos and hold out every fourth of them, at random, to judge by.

    At most 300 photos calibrate, and at most 300 judge.

    Args:
        original: the network before compression, in eval mode; its preprocessing is used.
        data: photos without labels, as `lego.open_images` takes them.
        labelled: labelled images to measure top-1 on.
        class_map: file of the class folders of `labelled`, in the order of the outputs.

    Raises:
        DataError: there are no photos or too few, or `labelled` has no labels.
    """
    photos = open_images(data, original, labels=False)
    if isinstance(photos.dataset, IterableDataset):
        raise DataError(f"{data!r} is a stream, which cannot be divided; give a folder of photos")
    if photos.size < FEWEST_PHOTOS:
        raise DataError(
            f"{data!r} holds {photos.size} photos; at least {FEWEST_PHOTOS} are needed, and "
            f"{MOST_PHOTOS} or more are better: int8 forms are calibrated with three quarters of "
            "them and judged by the others"
        )
    judged_by = None
    if labelled is not None:
        judged_by = open_images(labelled, original, class_map=class_map)
        if not judged_by.labelled:
            raise DataError(f"{labelled!r} has no labels; it should have one sub-folder per class")
    order = torch.randperm(photos.size, generator=torch.Generator().manual_seed(0)).tolist()
    n_held_out = photos.size // HELD_OUT
    return Judge(
        original,
        _select(photos, order[n_held_out:][:MOST_PHOTOS]),
        _select(photos, order[:n_held_out][:MOST_PHOTOS]),
        judged_by,
    )


def _select(photos: Images, positions: list[int]) -> Images:
    return replace(photos, dataset=Subset(photos.dataset, positions), size=len(positions))
