"""Data sets of image files, of arrays in memory, and of timm's named data sets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset

from legocompress.errors import DataError

UNLABELLED = -1


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files with labels; an unreadable file raises a DataError that names it."""

    def __init__(self, items: list[tuple[str, int]], transform: Callable[..., Tensor], mode: str):
        self.items, self.transform, self.mode = items, transform, mode

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        path, label = self.items[position]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert(self.mode)), label
        # Pillow raises many kinds of exceptions on damaged files.
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


class NamedImages(Dataset[tuple[Tensor, int]]):
    """A named data set of timm; an unreadable image is an error, where timm would skip it."""

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
        # Each library behind these names has its own exceptions.
        except Exception as error:
            where = f"{position}"
            if isinstance(self.found, ImageDataset):
                where += f" ({self.found.filename(position)})"
            raise DataError(
                f"image {where} of data set {self.name!r} cannot be read "
                f"({' '.join(str(error).split())[:200]}); remove or repair it"
            ) from None
        return self.transform(image), UNLABELLED if label is None else int(label)
