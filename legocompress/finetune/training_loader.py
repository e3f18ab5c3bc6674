"""Load training images in an order that depends on seed and epoch only, so that runs can resume."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from legocompress.data.images import Images
from legocompress.data.loader import Loader
from legocompress.errors import DataError, UsageError
from legocompress.finetune.augmentation import create_training_transform
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.seeding import derive_seed, preserve_random_state, seed_all


class _SeededImages(Dataset[tuple[Tensor, int]]):
    """Images under a transform whose draws depend on seed, epoch and position only.

    Items are read by (epoch, position). Reading one leaves this process's generators seeded for it.
    """

    def __init__(self, dataset: Any, transform: Callable[..., Tensor], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Any) -> tuple[Tensor, int]:
        epoch, position = place
        image, label = self.dataset[position]
        seed_all(self.seed, "image", epoch, position)
        return self.transform(image), label


class _SeededStream(IterableDataset[tuple[Tensor, int]]):
    """A stream of images under a transform; its draws depend on place, worker and count only."""

    def __init__(self, dataset: Any, transform: Callable[..., Tensor], place: tuple[int, ...]):
        self.dataset, self.transform, self.place = dataset, transform, place

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        for count, (image, label) in enumerate(self.dataset):
            with preserve_random_state():  # the stream itself draws, too
                seed_all("image", *self.place, number, count)
                transformed = self.transform(image)
            yield transformed, label


class TrainingLoader:
    """The parts of an epoch's updates that one process computes, from any update on.

    The `batch_size` images of an update are cut into `processes * accumulate` equal parts, in an
    order that depends on seed and epoch only. So several processes compute the same update as one
    process that accumulates as many parts.

    Attributes:
        part: number of images per part.
        updates: number of updates per epoch; images that do not fill an update are left out.

    Raises:
        UsageError: the batch does not divide into the parts, there are too few images, or timm
            refuses the augmentation.
    """

    def __init__(
        self,
        images: Images,
        model: nn.Module,
        recipe: Recipe,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        self.images, self.recipe = images, recipe
        self.rank, self.processes, self.workers = rank, processes, workers
        self.pin_memory = pin_memory
        self.transform = create_training_transform(model, recipe.augment)
        n_parts = processes * recipe.accumulate
        if recipe.batch_size % n_parts:
            raise UsageError(
                f"batch_size={recipe.batch_size} cannot be cut into {n_parts} equal parts "
                f"({processes} processes, accumulate={recipe.accumulate})"
            )
        self.part = recipe.batch_size // n_parts
        if recipe.mixup is not None and self.part % 2:
            raise UsageError(f"mixup takes images in pairs, and a part has {self.part}")
        self.updates = images.size // recipe.batch_size
        if not self.updates:
            raise UsageError(
                f"{images.name!r} has {images.size} images to train on, fewer than "
                f"batch_size={recipe.batch_size}; --set batch_size={images.size // 2 or 1}"
            )

    def parts(self, epoch: int, start: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Images (N, c, H, W) and labels (N,) of every part from update `start` on.

        Raises:
            DataError: an image cannot be read, or a stream ends too early.
        """
        if self._is_stream:  # it cannot start in the middle, so earlier parts are read and dropped
            loader, n_skipped = self._load_stream(epoch), start * self.recipe.accumulate
        else:
            loader, n_skipped = self._load_by_position(epoch, start), 0
        n_parts = (self.updates - start) * self.recipe.accumulate
        for number, batch in enumerate(loader):
            if number >= n_skipped:
                yield batch
            if number + 1 == n_skipped + n_parts:
                return
        if self._is_stream:
            raise DataError(
                f"{self.images.name!r} ended before the {self.images.size} images that it announces"
            )

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.images.dataset, IterableDataset)

    def _load_by_position(self, epoch: int, start: int) -> DataLoader[Any]:
        seed = derive_seed(self.recipe.seed, "order", epoch)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.images.size, generator=generator).tolist()
        batches = []
        for update in range(start, self.updates):
            for number in range(self.recipe.accumulate):
                first = update * self.recipe.batch_size
                first += (number * self.processes + self.rank) * self.part
                batches.append([(epoch, position) for position in order[first : first + self.part]])
        return Loader(
            _SeededImages(self.images.dataset, self.transform, self.recipe.seed),
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=generator,
        )

    def _load_stream(self, epoch: int) -> DataLoader[Any]:
        dataset: Any = self.images.dataset
        dataset.set_epoch(epoch)
        seed = derive_seed(self.recipe.seed, "stream", epoch)
        return Loader(
            _SeededStream(dataset, self.transform, (self.recipe.seed, epoch, self.rank)),
            batch_size=self.part,
            drop_last=True,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(seed),
        )
