"""Data sets of image files, of arrays in memory, and of timm's named data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from logging import getLogger
from threading import Lock
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder, Places365

from legocompress.data.pixels import convert_image
from legocompress.errors import DataError

UNLABELLED = -1
_LOGGING = Lock()


class Converter:
    """Convert the images of one data set to a mode; log once that some have transparent pixels.

    All processes that read the data set share the memory of that mark.
    """

    def __init__(self, name: str, mode: str):
        self.name, self.mode = name, mode
        is_logged: Any = torch.zeros(1, dtype=torch.bool)
        self.is_logged = is_logged.share_memory_()

    def __call__(self, image: Image.Image) -> Image.Image:
        """Convert an image; a DataError continues its name."""
        converted, is_transparent = convert_image(image, self.mode)
        if is_transparent:
            with _LOGGING:  # threads share the mark, too
                is_first = not self.is_logged.item()
                self.is_logged.fill_(True)
        if is_transparent and is_first:
            getLogger("legocompress").warning(
                "images of %r have transparent pixels, which are blended with white", self.name
            )
        return converted


class StreamTransform:
    """The transform of a stream's images, with the conversion before it."""

    def __init__(self, convert: Converter, transform: Callable[..., Any]):
        self.convert, self.transform = convert, transform

    def __call__(self, image: Image.Image) -> Any:
        """Convert and transform an image."""
        with _name_image(f"of data set {self.convert.name!r}"):
            image = self.convert(image)
        return self.transform(image)


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files with labels; an unreadable file raises a DataError that names it."""

    def __init__(
        self,
        items: list[tuple[str, int]],
        transform: Callable[..., Tensor],
        convert: Converter,
    ):
        self.items, self.transform, self.convert = items, transform, convert

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        path, label = self.items[position]
        with _name_image(repr(path)), Image.open(path) as image:
            return self.transform(self.convert(image)), label

    def open(self, position: int) -> tuple[Image.Image, int]:
        """Read an image without the transform, and its label."""
        path, label = self.items[position]
        with _name_image(repr(path)), Image.open(path) as image:
            return self.convert(image), label


class Arrays(Dataset[tuple[Tensor, int]]):
    """Images held in memory as uint8."""

    def __init__(self, pixels: Any, labels: Any, transform: Callable[..., Tensor], mode: str):
        self.pixels, self.labels, self.transform, self.mode = pixels, labels, transform, mode

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, label = self.open(position)
        return self.transform(image), label

    def open(self, position: int) -> tuple[Image.Image, int]:
        """Make an image without the transform, and return its label."""
        image = Image.fromarray(self.pixels[position]).convert(self.mode)
        return image, int(self.labels[position])


class NamedImages(Dataset[tuple[Tensor, int]]):
    """A named data set of timm; an unreadable image is an error, where timm would skip it."""

    def __init__(self, dataset: Any, name: str, transform: Callable[..., Tensor], mode: str):
        self.dataset, self.name, self.transform = dataset, name, transform
        self.convert = Converter(name, mode)
        if isinstance(dataset, (DatasetFolder, Places365)):
            dataset.loader = _load_image  # torchvision's own clips 16 bits

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        with _name_image(f"{self._describe(position)} of data set {self.name!r}"):
            if isinstance(self.dataset, ImageDataset):
                file, label = self.dataset.reader[position][:2]
                with closing(file):
                    image = self.convert(Image.open(file))
            else:
                image, label = self.dataset[position]
                image = self.convert(image)
        return self.transform(image), UNLABELLED if label is None else int(label)

    def _describe(self, position: int) -> str:
        """Return the position, and the file's name where the data set has files."""
        if isinstance(self.dataset, ImageDataset):
            return f"{position} ({self.dataset.filename(position)})"
        if isinstance(self.dataset, DatasetFolder):
            return f"{position} ({self.dataset.samples[position][0]})"
        return f"{position}"


def _load_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


@contextmanager
def _name_image(name: str) -> Iterator[None]:
    """Turn the errors of reading an image into a DataError that names it."""
    try:
        yield
    except DataError as error:  # of `convert_image`
        raise DataError(f"image {name} {error}") from None
    # Pillow raises many kinds of exceptions on damaged files, and each data set has its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"image {name} cannot be read ({reason}); remove or repair it") from None
