"""Training images: from where the recipe and the user say, in an order that can be resumed."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

from legocompress.data.datasets import Arrays
from legocompress.data.images import Images, open_images, preprocessing
from legocompress.data.loader import Loader
from legocompress.errors import DataError, UsageError
from legocompress.finetune.recipe import Augment, Data, Recipe
from legocompress.finetune.seeding import randomness_kept, seed_all, seed_of

IDX = {"train": "train", "validation": "t10k"}
SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "valid")}


def open_training(model: nn.Module, recipe: Recipe, data_dir: str) -> tuple[Images, Images]:
    """The training images as PIL images, and the validation images as `model` sees them.

    Args:
        model: the network.
        recipe: its `data` block says which data set, if any, and what is held out.
        data_dir: root of a named data set; a folder with a sub-folder a split, or of images only;
            a folder of MNIST-like idx.gz files; or an .npz file of `images`, `labels` and perhaps
            a boolean `test`.

    Raises:
        DataError: nothing is there, or there is nothing to validate on.
        UsageError: the recipe's loss reads labels, and there are none.
    """
    train = _split(model, recipe.data, data_dir, "train")
    data = recipe.data
    if data.holdout:
        train, validation = _hold_out(train, data, recipe.seed)
    else:
        validation = _split(model, data, data_dir, "validation")
        if (train.n_classes or 0) != (validation.n_classes or 0):
            raise DataError(
                f"{train.name!r} has {train.n_classes} classes and {validation.name!r} "
                f"{validation.n_classes}"
            )
    if recipe.uses_labels and not train.labelled:
        raise UsageError(
            f"{data_dir!r} has no labels, which the recipe's loss reads; without them the original "
            "network teaches alone: --set distill.labels=0"
        )
    if not isinstance(validation.dataset, IterableDataset):
        seen: Any = _Seen(validation.dataset, preprocessing(model)[0], None)
        validation = replace(validation, dataset=seen)
    return train, validation


def _as_is(image: Any) -> Any:
    return image


def _split(model: nn.Module, data: Data, data_dir: str, which: str) -> Images:
    split = getattr(data, which)
    path = Path(data_dir)
    if data.dataset is not None:
        return _named(model, data.dataset, data_dir, split, which == "train")
    if path.suffix == ".npz":
        return _npz(model, path, which == "train", bool(data.holdout))
    if (path / "train-images-idx3-ubyte.gz").is_file():
        return _idx(model, path, IDX[which])
    names = SPLITS[which] if split in SPLITS[which] else (split,)
    for name in names:
        if (path / name).is_dir():
            return _read(model, str(path / name))
    if which == "validation" or not path.is_dir():
        raise DataError(
            f"no {which} images under {data_dir!r}: looked for {', '.join(names)}; name the "
            f"sub-folder with --set data.{which}=NAME, hold some out with --set data.holdout=0.1, "
            "or name a data set with --set data.dataset=NAME"
        )
    return _read(model, data_dir)


def _read(model: nn.Module, where: str, data_dir: str | None = None, split: str = "") -> Images:
    return open_images(where, model, data_dir, split, transform=_as_is)


def _named(model: nn.Module, name: str, data_dir: str, split: str, training: bool) -> Images:
    images = _read(model, name, data_dir, split)
    if not isinstance(images.dataset, IterableDataset):
        return images
    # A stream shuffles by itself, if it is told that it is for training.
    transform, mode = preprocessing(model)
    stream: Any = images.dataset
    if training:
        stream = create_dataset(
            name, root=data_dir, split=split, is_training=True, input_img_mode=mode
        )
    stream.transform = _as_is if training else transform
    return replace(images, dataset=stream)


def _npz(model: nn.Module, path: Path, training: bool, holdout: bool) -> Images:
    images = _read(model, str(path))
    with np.load(path, allow_pickle=False) as file:
        test = file.get("test")
    if test is None and holdout:
        return images
    if test is None or test.dtype != np.bool_ or test.shape != (images.size,):
        raise DataError(
            f"{str(path)!r} has no boolean 'test' of one entry an image, which would tell the "
            "validation images; hold some out with --set data.holdout=0.1"
        )
    return _part(images, np.flatnonzero(~test if training else test).tolist())


def _idx(model: nn.Module, folder: Path, prefix: str) -> Images:
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if len(pixels) != len(labels):
        raise DataError(f"{str(folder)!r}: {len(pixels)} images and {len(labels)} labels")
    dataset: Any = Arrays(pixels, labels, _as_is, preprocessing(model)[1])
    return Images(dataset, len(pixels), True, f"{folder}/{prefix}")


def _read_idx(path: Path, n_dims: int) -> Any:
    """The unsigned bytes of a gzipped idx file of `n_dims` dimensions."""
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read()
        if raw[:4] != bytes((0, 0, 8, n_dims)):
            raise ValueError("its header is not that of an idx file of bytes")
        shape = np.frombuffer(raw, ">u4", count=n_dims, offset=4).astype(int)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims).reshape(tuple(shape))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error


def _hold_out(images: Images, data: Data, seed: int) -> tuple[Images, Images]:
    if isinstance(images.dataset, IterableDataset):
        raise UsageError("data.holdout needs a data set with positions, which a stream has not")
    number = round(data.holdout * images.size) if data.holdout < 1 else round(data.holdout)
    if not 0 < number < images.size:
        raise UsageError(f"data.holdout={data.holdout:g} of {images.size} images leaves nothing")
    order = list(range(images.size))
    if data.holdout_from == "random":
        generator = torch.Generator().manual_seed(seed_of(seed, "holdout"))
        order = torch.randperm(images.size, generator=generator).tolist()
    return _part(images, order[:-number]), _part(images, order[-number:])


def _part(images: Images, positions: list[int]) -> Images:
    dataset: Any = Subset(images.dataset, positions)
    return replace(images, dataset=dataset, size=len(positions))


def training_transform(model: nn.Module, augment: Augment) -> Callable[[Any], Tensor]:
    """From a PIL image to the network's input, drawn anew at every call.

    Raises:
        UsageError: timm refuses the augmentation.
    """
    cfg = resolve_data_config({}, model=model)
    wanted = augment.model_dump(exclude={"crop", "padding"})
    for key in ("crop_pct", "crop_mode"):
        cfg.pop(key, None)
    try:
        whole: Any = create_transform(**cfg, is_training=True, **wanted)
        steps: list[Any] = whole.transforms
        size = cfg["input_size"][1:]
        resized = Resize(size, InterpolationMode(cfg["interpolation"]))
        shift = [RandomCrop(size, padding=augment.padding)] if augment.crop == "shift" else []
        first = steps[:1] if augment.crop == "resized" else [resized, *shift]
        composed: Callable[[Any], Tensor] = Compose([*first, *steps[1:]])
        return composed
    # What timm and torchvision raise for arguments that they do not take.
    except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"augment: timm refuses {wanted}: {error}") from error


class _Seen(Dataset[tuple[Tensor, int]]):
    """Images under a transform whose draws depend on seed, epoch and position alone.

    With a seed, reading an image leaves the generators of this process seeded for it.
    """

    def __init__(self, dataset: Any, transform: Callable[..., Tensor], seed: int | None):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Any) -> tuple[Tensor, int]:
        if self.seed is None:
            image, label = self.dataset[place]
            return self.transform(image), label
        epoch, position = place
        image, label = self.dataset[position]
        seed_all(self.seed, "image", epoch, position)
        return self.transform(image), label


class _Stream(IterableDataset[tuple[Tensor, int]]):
    """A stream of images under a transform; its draws depend on the worker and its count too."""

    def __init__(self, dataset: Any, transform: Callable[..., Tensor], place: tuple[int, ...]):
        self.dataset, self.transform, self.place = dataset, transform, place

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        for count, (image, label) in enumerate(self.dataset):
            with randomness_kept():  # the stream itself draws, too
                seed_all("image", *self.place, number, count)
                seen = self.transform(image)
            yield seen, label


class TrainingLoader:
    """The parts of an epoch's updates that one process computes, from any update on.

    An update's `batch_size` images are cut into `processes * accumulate` parts, in an order that
    depends on seed and epoch alone; so as many processes as parts compute what one process does
    that accumulates them.
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
        self.transform = training_transform(model, recipe.augment)
        parts = processes * recipe.accumulate
        if recipe.batch_size % parts:
            raise UsageError(
                f"batch_size={recipe.batch_size} cannot be cut into {parts} equal parts "
                f"({processes} processes, accumulate={recipe.accumulate})"
            )
        self.part = recipe.batch_size // parts
        if recipe.mixup is not None and self.part % 2:
            raise UsageError(f"mixup takes images in pairs, and a part has {self.part}")
        self.updates = images.size // recipe.batch_size
        if not self.updates:
            raise UsageError(
                f"{images.name!r} has {images.size} images to train on, fewer than "
                f"batch_size={recipe.batch_size}; --set batch_size={images.size // 2 or 1}"
            )

    def parts(self, epoch: int, start: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Images (N, c, H, W) and labels (N,) of every part from update `start` on."""
        loader = self._stream(epoch) if self._streams else self._positions(epoch, start)
        skip = start * self.recipe.accumulate if self._streams else 0
        left = (self.updates - start) * self.recipe.accumulate
        for number, batch in enumerate(loader):
            if number >= skip:
                yield batch
            if number + 1 == skip + left:
                return
        if self._streams:
            raise DataError(
                f"{self.images.name!r} ended before the {self.images.size} images that it announces"
            )

    @property
    def _streams(self) -> bool:
        return isinstance(self.images.dataset, IterableDataset)

    def _positions(self, epoch: int, start: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed_of(self.recipe.seed, "order", epoch))
        order = torch.randperm(self.images.size, generator=generator).tolist()
        batches = []
        for update in range(start, self.updates):
            for number in range(self.recipe.accumulate):
                first = update * self.recipe.batch_size
                first += (number * self.processes + self.rank) * self.part
                batches.append([(epoch, place) for place in order[first : first + self.part]])
        seen = _Seen(self.images.dataset, self.transform, self.recipe.seed)
        return Loader(
            seen,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=generator,
        )

    def _stream(self, epoch: int) -> DataLoader[Any]:
        found: Any = self.images.dataset
        found.set_epoch(epoch)
        stream = _Stream(found, self.transform, (self.recipe.seed, epoch, self.rank))
        return Loader(
            stream,
            batch_size=self.part,
            drop_last=True,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(seed_of(self.recipe.seed, "stream", epoch)),
        )
