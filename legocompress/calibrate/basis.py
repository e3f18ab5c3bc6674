"""The coordinates in which filters are tuned: those in which their inputs are uncorrelated.

Neighbouring pixels and channels say much the same, so a step that Adam takes along one weight after
the other moves the outputs far in some directions and hardly in others.
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
WIDEST = 1_152  # of a fragment; eigenvectors cost its cube


def input_bases(
    model: nn.Module, layers: Iterable[nn.Conv2d | nn.Linear | LegoModule], images: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Eigenvectors of the second moments of what the filters of each layer see.

    Args:
        model: in eval mode.
        layers: Lego layers, whose Lego filters see the fragments of all splits, or plain convs.
        images: (N, c, H, W), of which the first are run.

    Returns:
        Of the filters (r, ...) of D numbers a row, (D, D) with an eigenvector a column. Filters
        that saw nothing finite, or are wider than pays, are left out.
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
            seen = call.patches(image, position, channels).reshape(-1, width).double()
            sums[filters] = sums.get(filters, 0) + seen.mT @ seen

    hear_calls(model, layers, images[:IMAGES], add)
    return {
        filters: torch.linalg.eigh(square).eigenvectors.to(filters.dtype)
        for filters, square in sums.items()
        if bool(square.isfinite().all())
    }
