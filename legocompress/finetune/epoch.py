"""Evaluate the network after an epoch, and decide whether it is the best so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset, Subset

from legocompress.data.evaluation import evaluate
from legocompress.data.images import Images
from legocompress.errors import UsageError
from legocompress.finetune.distributed import Processes
from legocompress.finetune.progress import Progress


@dataclass(frozen=True)
class Epoch:
    """The result of an epoch, of the network as it is stored; `best` if no earlier one was better.

    Accuracies and agreement with the original are percentages, None where there are no labels or
    no original.
    """

    progress: Progress
    top1: float | None
    top5: float | None
    agreement: float | None
    best: bool

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: top-1, or agreement where there are no labels."""
        value = self.agreement if self.top1 is None else self.top1
        return -math.inf if value is None else value

    def metrics(self) -> dict[str, float]:
        """The numbers of this epoch by name, without those that are None."""
        values = {
            "train/loss": self.progress.loss,
            "train/top1": self.progress.top1,
            "train/lr": self.progress.lr,
            "train/index_changes": self.progress.changed,
            "eval/top1": self.top1,
            "eval/top5": self.top5,
            "eval/agreement": self.agreement,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class EpochEvaluator:
    """Evaluates networks on the validation images, each process on its share of them.

    `original` is the network to agree with, None unless the recipe distils.
    """

    validation: Images
    original: nn.Module | None
    batch_size: int
    workers: int
    processes: Processes

    def evaluate(self, stored: nn.Module, progress: Progress, best: float) -> Epoch:
        """Evaluate the network as it is stored; `best` is the highest score of earlier epochs.

        Raises:
            UsageError: there are neither labels nor an original to score by.
        """
        share = self._take_share()
        batches = share.batches(self.batch_size, self.workers)
        result = evaluate(stored, batches, self.original, share.n_classes)
        values = [result.top1, result.top5, result.agreement]
        *sums, n_images = self.processes.sum(
            *((value or 0.0) * result.images for value in values), result.images
        )
        top1, top5, agreement = (
            None if value is None else total / n_images
            for value, total in zip(values, sums, strict=True)
        )
        epoch = Epoch(progress, top1, top5, agreement, False)
        if epoch.score == -math.inf:
            raise UsageError(
                "the validation images have no labels and no network is distilled, so there is "
                "nothing to tell a good epoch by"
            )
        return replace(epoch, best=epoch.score > best)

    def _take_share(self) -> Images:
        """Every `size`-th validation image from this process's rank on."""
        dataset: Any = self.validation.dataset
        size = self.processes.size
        is_stream = isinstance(dataset, IterableDataset)  # it divides itself
        if size == 1 or self.validation.size < size or is_stream:
            return self.validation
        positions = range(self.processes.rank, self.validation.size, size)
        subset = Subset(dataset, positions)
        return replace(self.validation, dataset=subset, size=len(positions))
