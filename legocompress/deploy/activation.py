"""The activations that a deployed layer can apply itself."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "relu", "relu6", "silu"]
# By module class, function, or name of a tensor method.
ACTIVATIONS: dict[Any, Activation] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu",
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu",
}  # fmt: skip


def activate_(y: Tensor, activation: Activation) -> Tensor:
    """Apply an activation in place."""
    if activation == "relu":
        return torch.relu_(y)
    if activation == "relu6":
        return F.hardtanh(y, 0.0, 6.0, inplace=True)
    return F.silu(y, inplace=True) if activation == "silu" else y
