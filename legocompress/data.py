"""Images in: folders, timm dataset names, and arrays, under the preprocessing of a model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from legocompress.errors import DataError

UNLABELLED = -1
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SCHEMES = ("torch", "hfds", "hfids", "tfds", "wds")  # the kinds of named data sets that timm knows


@dataclass(frozen=True)
class Images:
    """A data set of (image tensor, label) and what its labels mean.

    `labelled` is False where the labels are all `UNLABELLED`. `n_classes` is the number of class
    folders where their order alone gives the labels, else None.
    """

    dataset: Dataset[tuple[Tensor, int]]
    size: int
    labelled: bool
    name: str
    n_classes: int | None = None

    def batches(self, batch_size: int, workers: int = 0) -> DataLoader[Any]:
        """Batches in the order of the data set: images (N, c, H, W) and labels (N,)."""
        dataset: Dataset[Any] = self.dataset
        return Loader(dataset, batch_size, shuffle=False, num_workers=workers)

    def sample(self, n_images: int, seed: int = 0) -> Images:
        """At most `n_images` of them, drawn at random without repetition."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(self.size, generator=generator)[:n_images].tolist()
        return replace(self, dataset=Subset(self.dataset, drawn), size=len(drawn))


class Loader(DataLoader[Any]):
    """A loader whose workers end with its process, and tell errors as a sentence of their own."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.worker_init_fn = partial(_end_with, os.getpid())
        try:
            yield from super().__iter__()
        except DataError as error:
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.rpartition("DataError: ")[2]) from None


def _end_with(parent: int, worker: int) -> None:
    """Watch the process `parent` from now on, and end this one when it is gone.

    PyTorch's own watch asks for the parent's number after the worker has started: a worker whose
    parent is killed before that waits forever, and holds its memory and its open files.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def open_images(
    where: str,
    model: nn.Module,
    data_dir: str | None = None,
    split: str = "validation",
    class_map: str | None = None,
    labels: bool = True,
    transform: Callable[..., Any] | None = None,
) -> Images:
    """Open images under the preprocessing that `model` carries in its `pretrained_cfg`.

    Args:
        where: a folder of images (with a sub-folder a class, or none at all), an .npz file of
            `images` (N, H, W[, 3]) uint8 and perhaps `labels` (N,), or a timm dataset name such as
            `torch/cifar10`.
        model: the network that will see them.
        data_dir: root of a named data set.
        split: of a named data set.
        class_map: text file of class folder names, one a line, in the order of the outputs.
        labels: False drops the labels.
        transform: from a PIL image, in place of the preprocessing.

    Raises:
        DataError: nothing is there, an image cannot be read, or the labels cannot be those of the
            model.
    """
    own, mode = preprocessing(model)
    transform = own if transform is None else transform
    path = Path(where)
    if path.suffix == ".npz" and path.is_file():
        images = _arrays(path, transform, mode, labels)
    elif where and path.is_dir():
        images = _folder(path, transform, mode, class_map, labels)
    elif where.partition("/")[0] in SCHEMES and not path.exists():
        images = _named(where, data_dir, split, transform, mode, labels)
    else:
        raise DataError(
            f"no images at {where!r}; allowed are a folder, an .npz file with 'images', or a timm "
            "dataset name such as torch/cifar10 with --data-dir"
        )
    return images


def preprocessing(model: nn.Module) -> tuple[Callable[..., Tensor], str]:
    """The model's transform, tried on a blank image, and the mode of the images it takes."""
    cfg = resolve_data_config({}, model=model)
    try:
        channels = cfg["input_size"][0]
        if channels not in (1, 3):
            raise DataError(f"the model takes {channels} channels; images have 1 (grey) or 3 (RGB)")
        mode = "L" if channels == 1 else "RGB"
        transform = create_transform(**cfg, is_training=False)
        transform(Image.new(mode, (8, 8)))
    except (TypeError, ValueError, KeyError, RuntimeError, ArithmeticError) as error:
        raise DataError(
            f"the model's preprocessing {cfg} cannot be applied: {type(error).__name__} {error}"
        ) from error
    return transform, mode


class _Files(Dataset[tuple[Tensor, int]]):
    """Image files with labels; one that cannot be read is an error that names it."""

    def __init__(self, items: list[tuple[str, int]], transform: Callable[..., Tensor], mode: str):
        self.items, self.transform, self.mode = items, transform, mode

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        path, label = self.items[position]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert(self.mode)), label
        # Pillow's readers raise many kinds of error on damaged files.
        except Exception as error:
            raise DataError(
                f"image {path!r} cannot be read ({error}); remove or repair it"
            ) from None


class Arrays(Dataset[tuple[Tensor, int]]):
    """Images held in memory as uint8."""

    def __init__(self, pixels: Any, labels: Any, transform: Callable[..., Tensor], mode: str):
        self.pixels, self.labels, self.transform, self.mode = pixels, labels, transform, mode

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.pixels[position]).convert(self.mode)
        return self.transform(image), int(self.labels[position])


class _Named(Dataset[tuple[Tensor, int]]):
    """A data set of timm's, whose own class would skip an image that cannot be read."""

    def __init__(self, found: Any, name: str, transform: Callable[..., Tensor], mode: str):
        self.found, self.name, self.transform, self.mode = found, name, transform, mode

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        try:
            if isinstance(self.found, ImageDataset):
                file, label = self.found.reader[position][:2]
                with closing(file):
                    image = Image.open(file).convert(self.mode)
            else:
                image, label = self.found[position]
                image = image.convert(self.mode)
        # Each library behind these names has errors of its own.
        except Exception as error:
            where = f"{position}"
            if isinstance(self.found, ImageDataset):
                where += f" ({self.found.filename(position)})"
            raise DataError(
                f"image {where} of data set {self.name!r} cannot be read "
                f"({' '.join(str(error).split())[:200]}); remove or repair it"
            ) from None
        return self.transform(image), UNLABELLED if label is None else int(label)


def _folder(
    path: Path, transform: Callable[..., Tensor], mode: str, class_map: str | None, labels: bool
) -> Images:
    order = None if class_map is None else _class_order(Path(class_map))
    items, classes = find_images_and_targets(str(path), IMAGE_TYPES, class_to_idx=order)
    if not items:
        raise DataError(f"folder {str(path)!r} holds no images" + _outside(order, class_map))
    labelled = labels and (order is not None or len(classes) > 1)
    if not labelled:
        items = [(file, UNLABELLED) for file, _ in items]
    n_classes = len(classes) if labelled and order is None else None
    return Images(_Files(items, transform, mode), len(items), labelled, str(path), n_classes)


def _outside(order: dict[str, int] | None, class_map: str | None) -> str:
    return "" if order is None else f" in a sub-folder that {class_map!r} names"


def _class_order(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class map {str(path)!r} cannot be read: {error}") from error
    return {line.strip(): position for position, line in enumerate(lines) if line.strip()}


def _arrays(path: Path, transform: Callable[..., Tensor], mode: str, labels: bool) -> Images:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            pixels = file["images"]
            targets = file["labels"] if labels and "labels" in file else None
    # Damaged archives end in errors of zipfile, zlib and tokenize, and more.
    except Exception as error:
        raise DataError(f"{str(path)!r} is no .npz file with 'images': {error}") from error
    colours = pixels.shape[3:] or (3,)
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or colours != (3,) or not pixels.size:
        raise DataError(
            f"'images' of {str(path)!r} are {pixels.dtype} {pixels.shape}; expected uint8 "
            "(N, H, W) or (N, H, W, 3)"
        )
    if targets is not None and (targets.shape != (len(pixels),) or targets.dtype.kind not in "iu"):
        raise DataError(
            f"'labels' of {str(path)!r} are {targets.dtype} {targets.shape}; one integer an image "
            "expected"
        )
    labelled = targets is not None
    targets = np.full(len(pixels), UNLABELLED) if targets is None else targets
    return Images(Arrays(pixels, targets, transform, mode), len(pixels), labelled, str(path))


def _named(
    name: str,
    data_dir: str | None,
    split: str,
    transform: Callable[..., Tensor],
    mode: str,
    labels: bool,
) -> Images:
    try:
        found: Any = create_dataset(name, root=data_dir, split=split, input_img_mode=mode)
        dataset: Any = _Named(found, name, transform, mode)
        if isinstance(found, IterableDataset):  # a stream, which has no positions to read at
            dataset = found
            dataset.transform = transform
        size = len(found)
    # Each library behind these names has errors of its own.
    except Exception as error:
        raise DataError(
            f"data set {name!r} (split {split!r}, --data-dir {data_dir}) cannot be opened: "
            + " ".join(str(error).split())[:500]
        ) from error
    return Images(dataset, size, labels, name)
