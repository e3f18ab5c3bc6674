"""What every rival gives: a network of smaller layers, and how to fit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from legocompress.calibrate.moments import Moments

Fit = Callable[[nn.Module, str, Moments, Moments], None]


@dataclass(frozen=True)
class Shrunk:
    """A network of the right shapes, and how to fit its layers.

    `fit` puts the fitted form of one layer into a network, which is `start` before the first layer.
    `channels` are the output channels of the original that a layer still has, where some are gone.
    """

    network: nn.Module
    start: nn.Module
    fit: Fit
    channels: dict[str, Tensor] = field(default_factory=dict)


Shrink = Callable[[nn.Module, Sequence[str], float], Shrunk]  # network, layers, ratio


def get_convs(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Conv2d]:
    """The ungrouped convs of these names."""
    convs: dict[str, nn.Conv2d] = {}
    for name in names:
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        assert conv.groups == 1
        convs[name] = conv
    return convs
