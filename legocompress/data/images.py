"""Open images for a model: folders, timm dataset names, and arrays."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from legocompress.data.datasets import (
    UNLABELLED,
    Arrays,
    Converter,
    ImageFiles,
    NamedImages,
    StreamTransform,
)
from legocompress.data.folder import find_images
from legocompress.data.loader import Loader
from legocompress.errors import DataError

SCHEMES = ("torch", "hfds", "hfids", "tfds", "wds")  # the kinds of named data sets that timm knows


@dataclass(frozen=True)
class Images:
    """A data set of (image tensor, label), and what its labels mean.

    `labelled` is False where all labels are `UNLABELLED`. `n_classes` is the number of class
    folders if the labels follow from their order alone, else None.
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
        """Draw at most `n_images` of them at random, without repetition."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(self.size, generator=generator)[:n_images].tolist()
        return replace(self, dataset=Subset(self.dataset, drawn), size=len(drawn))


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

    Images become 8-bit RGB, or grey for a network of one channel: 16-bit integers are scaled and
    transparent pixels are blended with white. The EXIF orientation is not applied, as in
    torchvision and timm. In paths, `~` is the home folder.

    Args:
        where: a folder of images (with one sub-folder per class, or with none), an .npz file with
            `images` (N, H, W[, 3]) uint8 and optionally `labels` (N,), or a timm dataset name such
            as `torch/cifar10`.
        model: the network that the images are for.
        data_dir: root of a named data set.
        split: of a named data set.
        class_map: text file of class folder names, one per line, in the order of the outputs.
        labels: False drops the labels.
        transform: function of a PIL image that replaces the preprocessing.

    Raises:
        DataError: there are no images, an image cannot be read or has no defined range of values
            (floating point), or the labels do not fit the model.
    """
    where = os.path.expanduser(where)
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    class_map = None if class_map is None else os.path.expanduser(class_map)
    model_transform, mode = preprocessing(model)
    transform = model_transform if transform is None else transform
    path = Path(where)
    if path.suffix == ".npz" and path.is_file():
        images = _open_arrays(path, transform, mode, labels)
    elif where and path.is_dir():
        images = _open_folder(path, transform, mode, class_map, labels)
    elif where.partition("/")[0] in SCHEMES and not path.exists():
        images = _open_named(where, data_dir, split, transform, mode, labels)
    else:
        raise DataError(
            f"no images at {where!r}; allowed are a folder, an .npz file with 'images', or a timm "
            "dataset name such as torch/cifar10 with --data-dir"
        )
    return images


def preprocessing(model: nn.Module) -> tuple[Callable[..., Tensor], str]:
    """Return the transform of a model, tried on a blank image, and the mode of its images."""
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


def _open_folder(
    path: Path, transform: Callable[..., Tensor], mode: str, class_map: str | None, labels: bool
) -> Images:
    order = None if class_map is None else _class_order(Path(class_map))
    items, classes = find_images(str(path), order, class_map)
    labelled = labels and (order is not None or len(classes) > 1)
    if not labelled:
        items = [(file, UNLABELLED) for file, _ in items]
    n_classes = len(classes) if labelled and order is None else None
    files = ImageFiles(items, transform, Converter(str(path), mode))
    return Images(files, len(items), labelled, str(path), n_classes)


def _class_order(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class map {str(path)!r} cannot be read: {error}") from error
    return {line.strip(): position for position, line in enumerate(lines) if line.strip()}


def _open_arrays(path: Path, transform: Callable[..., Tensor], mode: str, labels: bool) -> Images:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            pixels = file["images"]
            targets = file["labels"] if labels and "labels" in file else None
    # Damaged archives end in errors of zipfile, zlib and tokenize, and more.
    except Exception as error:
        raise DataError(f"{str(path)!r} is not an .npz file with 'images': {error}") from error
    colours = pixels.shape[3:] or (3,)
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or colours != (3,) or not pixels.size:
        raise DataError(
            f"'images' of {str(path)!r} are {pixels.dtype} {pixels.shape}; expected uint8 "
            "(N, H, W) or (N, H, W, 3)"
        )
    if targets is not None and (targets.shape != (len(pixels),) or targets.dtype.kind not in "iu"):
        raise DataError(
            f"'labels' of {str(path)!r} are {targets.dtype} {targets.shape}; expected one "
            "integer per image"
        )
    labelled = targets is not None
    targets = np.full(len(pixels), UNLABELLED) if targets is None else targets
    return Images(Arrays(pixels, targets, transform, mode), len(pixels), labelled, str(path))


def _open_named(
    name: str,
    data_dir: str | None,
    split: str,
    transform: Callable[..., Tensor],
    mode: str,
    labels: bool,
) -> Images:
    try:
        timm_dataset = create_named(name, data_dir, split, transform, mode)
        is_stream = isinstance(timm_dataset, IterableDataset)  # which has no positions to read at
        dataset: Any = (
            timm_dataset if is_stream else NamedImages(timm_dataset, name, transform, mode)
        )
        size = len(timm_dataset)
    # Each library behind these names has errors of its own.
    except Exception as error:
        raise DataError(
            f"data set {name!r} (split {split!r}, --data-dir {data_dir}) cannot be opened: "
            + " ".join(str(error).split())[:500]
        ) from error
    return Images(dataset, size, labels, name)


def create_named(
    name: str,
    data_dir: str | None,
    split: str,
    transform: Callable[..., Any],
    mode: str,
    is_training: bool = False,
) -> Any:
    """Create a named data set of timm; if it is a stream, with conversion and transform.

    Args:
        name: as timm takes it.
        data_dir: its root.
        split: the split.
        transform: function of a PIL image; only a stream gets it here.
        mode: mode that a stream's images are converted to, RGB or L.
        is_training: a stream shuffles.
    """
    # The readers of tfds make images of arrays of bytes, and need to know the mode.
    reader_mode = mode if name.startswith("tfds/") else ""
    dataset: Any = create_dataset(
        name, root=data_dir, split=split, is_training=is_training, input_img_mode=reader_mode
    )
    if isinstance(dataset, IterableImageDataset):
        dataset.transform = StreamTransform(Converter(name, mode), transform)
    return dataset
