"""The two memory formats of feature maps, by the names that choices and checkpoints use."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Format = Literal["nchw", "channels_last"]
TORCH_FORMATS: dict[Format, torch.memory_format] = {
    "nchw": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def to_memory_format(x: Tensor, memory_format: Format) -> Tensor:
    """A feature map (N, c, H, W) in a memory format; tensors of other ranks are returned as is."""
    return x.contiguous(memory_format=TORCH_FORMATS[memory_format]) if x.dim() == 4 else x
