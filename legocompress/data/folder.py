"""List the image files of a folder and their classes, and tell which files are left out."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from logging import getLogger

from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from legocompress.errors import DataError

ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".gif", ".avif", ".webp", ".bmp", ".tif", ".tiff", ".ppm",
    ".pgm",
)  # fmt: skip
N_LISTED = 8  # endings or sub-folders in a message


def image_endings() -> tuple[str, ...]:
    """Return the endings of image files that the installed Pillow opens."""
    formats = Image.registered_extensions()
    return tuple(ending for ending in ENDINGS if formats.get(ending) in Image.OPEN)


def find_images(
    folder: str, class_order: dict[str, int] | None = None, class_map: str | None = None
) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Find the images of a folder and its sub-folders, in natural order.

    A log message tells how many files of other types are left out.

    Args:
        folder: where to look.
        class_order: output number per class name; without it, the order of the sub-folders.
        class_map: the file that `class_order` was read from.

    Returns:
        Pairs of path and output number, and the output number per class name.

    Raises:
        DataError: there are no images.
    """
    endings = image_endings()
    items, classes = find_images_and_targets(folder, endings, class_to_idx=class_order)
    others, unnamed = _count_left_out(folder, endings, class_order)
    if not items:
        where = "" if class_order is None else f" in a sub-folder that {class_map!r} names"
        files = f"; its files are of other types ({_list_counts(others)})" if others else ""
        raise DataError(
            f"folder {folder!r} holds no images{where}{files}; these endings are read: "
            + " ".join(endings)
        )
    if others:
        subject, verb = _count(others, "file")
        warn_once(
            f"{subject} of other types in {folder!r} {verb} left out ({_list_counts(others)})"
        )
    if unnamed:
        subject, verb = _count(unnamed, "image")
        warn_once(
            f"{subject} in sub-folders of {folder!r} that {class_map!r} does not name {verb} left "
            f"out ({_list_counts(unnamed)})"
        )
    return items, classes


@cache
def warn_once(message: str) -> None:
    """Log a message, but only once per process."""
    getLogger("legocompress").warning(message)


def _count_left_out(
    folder: str, endings: tuple[str, ...], class_order: dict[str, int] | None
) -> tuple[Counter[str], Counter[str]]:
    """Count the files with other endings, and the images in sub-folders without a class.

    Hidden files such as .DS_Store are not counted.

    Returns:
        The number of files per ending, and of images per sub-folder.
    """
    others: Counter[str] = Counter()
    unnamed: Counter[str] = Counter()
    for root, _, files in os.walk(folder, followlinks=True):
        name = "" if root == folder else os.path.basename(root)
        is_unnamed = class_order is not None and name not in class_order
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if ending in endings:
                unnamed[name or "no sub-folder"] += is_unnamed
            elif not file.startswith("."):
                others[ending or "no ending"] += 1
    return others, +unnamed


def _count(counts: Counter[str], noun: str) -> tuple[str, str]:
    """Return the total with its noun, and the verb that fits: `1 file` `is`, `3 files` `are`."""
    number = counts.total()
    return (f"1 {noun}", "is") if number == 1 else (f"{number} {noun}s", "are")


def _list_counts(counts: Counter[str]) -> str:
    """List the most frequent names with their counts."""
    listed = [f"{name} {count}" for name, count in counts.most_common(N_LISTED)]
    return ", ".join([*listed, "..."] if len(counts) > N_LISTED else listed)
