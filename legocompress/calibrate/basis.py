"""The coordinates for tuning filters: those in which their inputs are uncorrelated.

Neighbouring pixels and channels are correlated. With one step size per weight, Adam would move the
outputs far in some directions and hardly at all in others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.calibrate.layers import sample
from legocompress.calibrate.stream import Call, hear_calls
from legocompress.lego.module import LegoModule

IMAGES = 64
SAMPLES = 4_096
WIDEST = 1_152  # values per fragment; the cost of eigenvectors grows with the cube


def input_bases(
    model: nn.Module, layers: Iterable[nn.Conv2d | nn.Linear | LegoModule], images: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Compute the eigenvectors of the second moments of the inputs of each layer's filters.

    Args:
        model: in eval mode.
        layers: plain convs, or Lego layers, whose filters get the fragments of all splits.
        images: (N, c, H, W); the first `IMAGES` of them are run.

    Returns:
        For filters (r, ...) with D numbers per row: a (D, D) matrix of eigenvectors as columns.
        Filters with inputs that are not finite, or wider than `WIDEST`, are left out.
    """
    sums: dict[nn.Parameter, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def add(layer: Any, calls: list[Call]) -> None:
        is_lego = isinstance(layer, LegoModule)
        filters = layer.lego_filters if is_lego else layer.weight
        width = filters[0].numel()
        if width > WIDEST:
            return
        for call in calls:
            shape = layer.lego_shape if is_lego else None
            channels = shape.n_split * shape.width if shape else call.weight.shape[1]
            per_image = -(-SAMPLES // len(call.x))
            image, position = sample(len(call.x), math.prod(call.size), per_image, generator)
            inputs = call.patches(image, position, channels).reshape(-1, width).double()
            sums[filters] = sums.get(filters, 0) + inputs.mT @ inputs

    hear_calls(model, layers, images[:IMAGES], add)
    return {
        filters: torch.linalg.eigh(square).eigenvectors.to(filters.dtype)
        for filters, square in sums.items()
        if bool(square.isfinite().all())
    }
