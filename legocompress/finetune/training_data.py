"""Open training and validation images: named data sets, folders, MNIST-like files, and arrays."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from legocompress.data.datasets import Arrays
from legocompress.data.images import Images, create_named, open_images, preprocessing
from legocompress.errors import DataError, UsageError
from legocompress.finetune.idx_files import has_idx_files, read_idx_split
from legocompress.finetune.recipe import Data, Recipe
from legocompress.finetune.seeding import derive_seed

IDX_PREFIXES = {"train": "train", "validation": "t10k"}
SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("validation", "val", "valid")}


def open_training(model: nn.Module, recipe: Recipe, data_dir: str) -> tuple[Images, Images]:
    """Open the training images as PIL images, and the validation images as `model` sees them.

    Args:
        model: the network.
        recipe: its `data` block names the data set, if any, and the hold-out set.
        data_dir: root of a named data set; a folder with one sub-folder per split, or of images
            only; a folder of MNIST-like idx.gz files; or an .npz file of `images`, `labels` and
            perhaps a boolean `test`.

    Raises:
        DataError: there are no images, or none to validate on.
        UsageError: the recipe's loss reads labels and there are none, or the hold-out set does not
            fit the data.
    """
    data_dir = os.path.expanduser(data_dir)
    data = recipe.data
    train = _open_split(model, data, data_dir, "train")
    if data.holdout:
        train, validation = _hold_out(train, data, recipe.seed)
    else:
        validation = _open_split(model, data, data_dir, "validation")
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
        transformed: Any = _TransformedImages(validation.dataset, preprocessing(model)[0])
        validation = replace(validation, dataset=transformed)
    return train, validation


class _TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images under a transform that draws nothing at random."""

    def __init__(self, dataset: Any, transform: Callable[..., Tensor]):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, label = self.dataset[position]
        return self.transform(image), label


def _keep_pil(image: Any) -> Any:
    """The transform of training images as they are opened; the loader transforms them later."""
    return image


def _open_split(model: nn.Module, data: Data, data_dir: str, which: str) -> Images:
    """Open the images of a split, `train` or `validation`, by what `data_dir` turns out to be."""
    split = getattr(data, which)
    path = Path(data_dir)
    if data.dataset is not None:
        return _open_named(model, data.dataset, data_dir, split, which == "train")
    if path.suffix == ".npz":
        return _open_npz(model, path, which == "train", bool(data.holdout))
    if has_idx_files(path):
        return _open_idx(model, path, IDX_PREFIXES[which])
    names = SPLIT_FOLDERS[which] if split in SPLIT_FOLDERS[which] else (split,)
    for name in names:
        if (path / name).is_dir():
            return _open_as_pil(model, str(path / name))
    if which == "validation" or not path.is_dir():
        raise DataError(
            f"no {which} images under {data_dir!r}: looked for {', '.join(names)}; name the "
            f"sub-folder with --set data.{which}=NAME, hold some out with --set data.holdout=0.1, "
            "or name a data set with --set data.dataset=NAME"
        )
    return _open_as_pil(model, data_dir)


def _open_as_pil(
    model: nn.Module, where: str, data_dir: str | None = None, split: str = ""
) -> Images:
    return open_images(where, model, data_dir, split, transform=_keep_pil)


def _open_named(model: nn.Module, name: str, data_dir: str, split: str, training: bool) -> Images:
    images = _open_as_pil(model, name, data_dir, split)
    if not isinstance(images.dataset, IterableDataset):
        return images
    # A stream shuffles by itself, but only one that is created for training.
    transform, mode = preprocessing(model)
    stream_transform = _keep_pil if training else transform
    stream = create_named(name, data_dir, split, stream_transform, mode, training)
    return replace(images, dataset=stream)


def _open_npz(model: nn.Module, path: Path, training: bool, holdout: bool) -> Images:
    images = _open_as_pil(model, str(path))
    with np.load(path, allow_pickle=False) as file:
        test = file.get("test")
    if test is None and holdout:
        return images
    if test is None or test.dtype != np.bool_ or test.shape != (images.size,):
        raise DataError(
            f"{str(path)!r} has no boolean 'test' with one entry per image, which would mark the "
            "validation images; hold some out with --set data.holdout=0.1"
        )
    return _select(images, np.flatnonzero(~test if training else test).tolist())


def _open_idx(model: nn.Module, folder: Path, prefix: str) -> Images:
    pixels, labels = read_idx_split(folder, prefix)
    dataset: Any = Arrays(pixels, labels, _keep_pil, preprocessing(model)[1])
    return Images(dataset, len(pixels), True, f"{folder}/{prefix}")


def _hold_out(images: Images, data: Data, seed: int) -> tuple[Images, Images]:
    """Divide images into those to train on and the hold-out set."""
    if isinstance(images.dataset, IterableDataset):
        raise UsageError(
            "data.holdout needs a data set with positions, which a stream does not have"
        )
    number = round(data.holdout * images.size) if data.holdout < 1 else round(data.holdout)
    if not 0 < number < images.size:
        raise UsageError(f"data.holdout={data.holdout:g} of {images.size} images leaves nothing")
    order = list(range(images.size))
    if data.holdout_from == "random":
        generator = torch.Generator().manual_seed(derive_seed(seed, "holdout"))
        order = torch.randperm(images.size, generator=generator).tolist()
    return _select(images, order[:-number]), _select(images, order[-number:])


def _select(images: Images, positions: list[int]) -> Images:
    dataset: Any = Subset(images.dataset, positions)
    return replace(images, dataset=dataset, size=len(positions))
