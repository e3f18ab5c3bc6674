"""What a rival costs in stored bytes and in MACs, and the largest ratio within a budget."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.rivals.palette import PALETTE_BITS, Palette
from legocompress.checkpoint.codec import encode
from legocompress.models.probe import default_input
from legocompress.report.macs import count_macs_with_fvcore

HALVINGS = 12


def count_stored_bytes(network: nn.Module) -> int:
    """Bytes of all tensors that a file would hold; of a palette, packed indices and codebook."""
    total = sum(t.numel() * t.element_size() for t in encode(network).values())
    for module in network.modules():
        if isinstance(module, Palette):
            packed = -(-module.number.numel() * PALETTE_BITS // 8)
            total += packed - module.number.numel() * module.number.element_size()
    return total


def count_macs(network: nn.Module) -> int:
    """Multiply-accumulates of one image, by fvcore."""
    image = default_input(network)
    assert image is not None
    counted = count_macs_with_fvcore(network, image)
    assert counted is not None
    return counted


COSTS: dict[str, Callable[[nn.Module], int]] = {"bytes": count_stored_bytes, "macs": count_macs}


def find_largest_ratio(cost: Callable[[float], float], budget: float) -> float:
    """The largest ratio in (0, 1] whose cost is within the budget, by bisection.

    Args:
        cost: of a ratio, with which it grows.
        budget: the most that it may cost.

    Raises:
        ValueError: no ratio is cheap enough.
    """
    if cost(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    if not low:
        raise ValueError(f"no ratio costs at most {budget:g}")
    return low
