"""The two memory formats of feature maps, by the names that choices and checkpoints use."""

from __future__ import annotations

import torch
from torch import Tensor

from legocompress.state.deployment import Format

TORCH_FORMATS: dict[Format, torch.memory_format] = {
    "nchw": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def to_memory_format(x: Tensor, memory_format: Format) -> Tensor:
    """A feature map (N, c, H, W) in a memory format; tensors of other ranks are returned as is."""
    return x.contiguous(memory_format=TORCH_FORMATS[memory_format]) if x.dim() == 4 else x
