"""Read MNIST's file format: gzipped idx files of unsigned bytes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from legocompress.errors import DataError


def has_idx_files(folder: Path) -> bool:
    """Whether a folder holds MNIST-like training images."""
    return (folder / "train-images-idx3-ubyte.gz").is_file()


def read_idx_split(folder: Path, prefix: str) -> tuple[Any, Any]:
    """Read the images (N, H, W) and labels (N,) of a split, both uint8.

    Args:
        folder: what holds the files.
        prefix: `train` or `t10k`, as MNIST calls its splits.

    Raises:
        DataError: a file is missing or damaged, or the two differ in N.
    """
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if len(pixels) != len(labels):
        raise DataError(f"{str(folder)!r}: {len(pixels)} images and {len(labels)} labels")
    return pixels, labels


def _read_idx(path: Path, n_dims: int) -> Any:
    """Read a file that holds one array of `n_dims` dimensions."""
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read()
        if raw[:4] != bytes((0, 0, 8, n_dims)):
            raise ValueError("its header is not that of an idx file of bytes")
        shape = np.frombuffer(raw, ">u4", count=n_dims, offset=4).astype(int)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims).reshape(tuple(shape))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error
