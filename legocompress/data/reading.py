"""Read images in threads of this process: decoding runs beside the network, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import transforms

from legocompress.data.datasets import Arrays, ImageFiles


@dataclass(frozen=True)
class _Source:
    """A data set that threads can read, and the positions that are read of it.

    `normalise` is the end of the data set's transform: from 8 bits to normalised floats.
    """

    dataset: ImageFiles | Arrays
    position: Callable[[int], int]
    resizing: list[transforms.Resize | transforms.CenterCrop]
    normalise: transforms.Normalize

    def read(self, number: int) -> tuple[Tensor, int]:
        """Return an image's 8-bit pixels (H, W, c) in memory of their own, and its label."""
        image, label = self.dataset.open(self.position(number))
        for step in self.resizing:
            # Not by a call, since tracing in another thread replaces `nn.Module.__call__`.
            image = step.forward(image)
        pixels = np.array(image)
        return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]), label

    def collate(self, items: Iterable[tuple[Tensor, int]]) -> list[Tensor]:
        """Make a batch: the values that the transform gives, and the labels (N,)."""
        pixels, labels = zip(*items, strict=True)
        stacked = torch.stack(pixels).permute(0, 3, 1, 2)
        images = stacked.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return [self.normalise.forward(images), torch.tensor(labels)]


def read_in_threads(
    dataset: Dataset[Any], batches: Iterable[list[int]]
) -> Iterator[list[Tensor]] | None:
    """Read batches of a data set in as many threads as PyTorch computes with.

    While the caller uses one batch, the next one is read. Decoding and resizing release the GIL.
    The pixels travel as 8 bits and are normalised as a whole batch, by the same arithmetic.

    Args:
        dataset: the data set.
        batches: the numbers of the images of each batch.

    Returns:
        The batches, or None where threads cannot read the data set: it is not made of image files
        or arrays, or its transform is not a standard one.
    """
    source = _find_source(dataset)
    return None if source is None else _read(source, batches)


def _find_source(dataset: Dataset[Any]) -> _Source | None:
    position: Callable[[int], int] = int
    if type(dataset) is Subset:
        position, dataset = dataset.indices.__getitem__, dataset.dataset
    if type(dataset) not in (ImageFiles, Arrays):
        return None
    files: Any = dataset
    transform: Any = files.transform
    if type(transform) is not transforms.Compose or len(transform.transforms) < 2:
        return None
    *resizing, to_tensor, normalise = transform.transforms
    # Only steps of which we know that they neither draw random numbers nor keep a state.
    if (
        any(type(step) not in (transforms.Resize, transforms.CenterCrop) for step in resizing)
        or type(to_tensor) not in (transforms.ToTensor, MaybeToTensor)
        or type(normalise) is not transforms.Normalize
    ):
        return None
    return _Source(files, position, resizing, normalise)


def count_threads() -> int:
    """The number of reading threads: as many as PyTorch computes with, at most one per core."""
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1))


def _read(source: _Source, batches: Iterable[list[int]]) -> Iterator[list[Tensor]]:
    pool = ThreadPoolExecutor(count_threads(), "legocompress-reader")
    pending: deque[list[Future[tuple[Tensor, int]]]] = deque()
    try:
        for numbers in batches:
            pending.append([pool.submit(source.read, number) for number in numbers])
            if len(pending) > 1:
                yield _collect(source, pending.popleft())
        while pending:
            yield _collect(source, pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(source: _Source, reads: list[Future[tuple[Tensor, int]]]) -> list[Tensor]:
    return source.collate([read.result() for read in reads])
