"""The range of a map: from the distribution of its values to a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from legocompress.state.quantization import MapRange

LEVELS = 255  # steps between the 256 values
BINS = 2048
# How a range is cut out of the values that were seen, by name.
PERCENTILES = {"99.999 %": 1e-5, "99.99 %": 1e-4, "99.9 %": 1e-3}
METHODS = ("min-max", *PERCENTILES, "least squares")
SHRINKING = np.linspace(1.0, 0.15, 35)  # of either end, tried for least squares


@dataclass
class Values:
    """The distribution of the values of one map.

    Attributes:
        low, high: the smallest and the largest value, and at most and at least 0.
        counts: of the values other than 0, in equal bins between `low` and `high`.
    """

    low: float = 0.0
    high: float = 0.0
    counts: Any = field(default_factory=lambda: np.zeros(BINS))

    def extend(self, x: Tensor) -> None:
        """Extend the limits by those of some values; they must be finite."""
        low, high = torch.aminmax(x.detach())
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def count(self, x: Tensor) -> None:
        """Count values, all of which `extend` has seen."""
        if self.high > self.low:
            counted = torch.histc(x.detach().float(), BINS, self.low, self.high)
            counts: Any = counted.double().numpy()
            place = min(BINS - 1, int(-self.low / (self.high - self.low) * BINS))
            counts[place] = max(0.0, counts[place] - float((x == 0).sum()))
            self.counts += counts

    def centres(self) -> Any:
        """The middle of each bin."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        return (edges[:-1] + edges[1:]) / 2


def join_values(members: list[Values]) -> Values:
    """The distribution of several maps together; each counts alike."""
    if len(members) == 1:
        return members[0]
    joined = Values(min(v.low for v in members), max(v.high for v in members))
    if joined.high > joined.low:
        for values in members:
            total = max(1.0, values.counts.sum())
            limits = (joined.low, joined.high)
            counts, _ = np.histogram(values.centres(), BINS, limits, weights=values.counts)
            joined.counts += counts / total
    return joined


def choose_range(values: Values, method: str) -> MapRange:
    """The range of a map by a method of `METHODS`."""
    low, high = values.low, values.high
    if method in PERCENTILES and values.counts.sum() > 0:
        low, high = _cut_tails(values, PERCENTILES[method])
    elif method == "least squares" and values.counts.sum() > 0:
        low, high = _least_squares(values)
    return make_range(low, high)


def make_range(low: float, high: float) -> MapRange:
    """The range from `low` <= 0 to `high` >= 0, with 0 exactly on one of the 256 values."""
    if high - low <= 1e-20:
        return MapRange(scale=1.0, zero=0)
    scale = (high - low) / LEVELS
    zero = round(-low / scale)
    if low < 0 < high:  # after 0 has moved onto a value, both ends must still be inside
        scale = max(-low / max(zero, 0.5), high / max(LEVELS - zero, 0.5))
    return MapRange(scale=float(np.float32(min(max(scale, 1e-30), 1e30))), zero=zero)


def _cut_tails(values: Values, share: float) -> tuple[float, float]:
    """The ends beyond which `share` of the values other than 0 lie, half of them at each end."""
    centres, total = values.centres(), np.cumsum(values.counts)
    cut = share * total[-1] / (2 if values.low < 0 < values.high else 1)
    low = centres[np.searchsorted(total, cut)] if values.low < 0 else 0.0
    high = centres[np.searchsorted(total, total[-1] - cut)] if values.high > 0 else 0.0
    return min(0.0, float(low)), max(0.0, float(high))


def _least_squares(values: Values) -> tuple[float, float]:
    """The ends with the least squared error of rounding and clamping together."""
    centres, counts = values.centres(), values.counts
    total = counts.sum()

    def clipped(excess: Any) -> Any:
        return np.square(excess.clip(0)) @ counts

    lows = values.low * SHRINKING if values.low < 0 else np.zeros(1)
    highs = values.high * SHRINKING if values.high > 0 else np.zeros(1)
    below = np.array([clipped(low - centres) for low in lows])
    above = np.array([clipped(centres - high) for high in highs])
    steps = (highs[None, :] - lows[:, None]) / LEVELS
    errors = below[:, None] + above[None, :] + total * np.square(steps) / 12
    row, column = np.unravel_index(np.argmin(errors), errors.shape)
    return float(lows[row]), float(highs[column])
