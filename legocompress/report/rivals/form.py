"""What every rival is built from, and what its builder returns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from legocompress.report.judge import Judge

EXTRA = "legocompress[rivals]"
RANDOM_IMAGES = 16  # that int8 forms are calibrated with where there are no photos

Form = Callable[[], Any]
Precision = Literal["fp32", "bf16", "int8"]


class LeftOut(Exception):
    """A rival cannot run here; the message is the reason, in one sentence."""


@dataclass(frozen=True)
class Subject:
    """What the rivals are built from.

    `dense` is the network with ordinary layers, in eval mode; `x` (N, c, H, W) the input that every
    rival runs on; `architecture` the name of the network, if it has one. `judge` has the photos to
    calibrate int8 forms with. `cache` keeps what is slow to build from one run to the next.
    """

    dense: nn.Module
    x: Tensor
    architecture: str | None = None
    judge: Judge | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    def calibration_batches(self, batch: int) -> Iterator[Tensor]:
        """Yield the images (batch, c, H, W) that an int8 form is calibrated with.

        They are the judge's photos, or random pixels under the preprocessing of the network. The
        last batch is filled up with its own images.
        """
        if self.judge is None:
            images: Iterator[Tensor] = iter(torch.split(self._random_images(), batch))
        else:
            images = (images for images, _ in self.judge.calibration.batches(batch))
        for some in images:
            yield some[torch.arange(batch) % len(some)]

    def _random_images(self) -> Tensor:
        cfg = resolve_data_config({}, model=self.dense)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(RANDOM_IMAGES, *self.x.shape[1:], generator=generator)
        mean, std = (
            torch.tensor(cfg[key]).float()[: pixels.shape[1], None, None] for key in ("mean", "std")
        )
        return (pixels - mean) / std


@dataclass(frozen=True)
class Runner:
    """A built rival: how it runs on a batch.

    Attributes:
        run: the network on what `prepare` returned.
        prepare: from a batch (N, c, H, W) to the tensor type and memory format of the rival; it is
            not timed.
        count_bytes: bytes on disk of the file that a user of this rival would ship.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[Tensor], Any] = lambda x: x
    count_bytes: Callable[[], int] | None = None

    def bind(self, x: Tensor) -> Form:
        """Return what runs this rival on one batch."""
        prepared = self.prepare(x)
        return lambda: self.run(prepared)

    def predict(self, images: Tensor) -> Any:
        """Run a batch; arrays of other libraries are returned as float32 tensors of their own."""
        output = self.run(self.prepare(images))
        if not isinstance(output, np.ndarray):
            return output
        return torch.as_tensor(output).float().clone()


def import_library(name: str) -> Any:
    """Import an optional library; raise LeftOut with what to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise LeftOut(f"{name} is not installed: pip install '{EXTRA}'") from None


def count_weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of a file of all tensors of a network, its floating-point ones in `dtype`."""
    tensors = model.state_dict().values()
    wide = [t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in wide)
