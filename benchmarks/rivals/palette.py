"""Palettes: 4-bit k-means over the weights of each layer (scikit-learn)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.rivals.shrunk import get_convs

PALETTE_BITS = 4


class Palette(nn.Module):
    """A weight as numbers into a codebook (16,), which is the parameter."""

    number: Tensor

    def __init__(self, weight: Tensor, seed: int) -> None:
        super().__init__()
        from sklearn.cluster import KMeans

        size = min(2**PALETTE_BITS, weight.numel())
        fitted = KMeans(size, random_state=seed, n_init=3).fit(weight.reshape(-1, 1).numpy())
        self.register_buffer("number", torch.from_numpy(fitted.labels_).reshape(weight.shape))
        self._codebook = torch.from_numpy(fitted.cluster_centers_[:, 0]).to(weight.dtype)

    def forward(self, codebook: Tensor) -> Tensor:
        """The weight."""
        return codebook[self.number.long()]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook, which becomes the parameter."""
        return self._codebook


def palettise(original: nn.Module, names: Sequence[str], seed: int) -> nn.Module:
    """A copy of the network with 16 values for the weights of each of these layers."""
    network = copy.deepcopy(original)
    for conv in get_convs(network, names).values():
        parametrize.register_parametrization(conv, "weight", Palette(conv.weight.detach(), seed))
    return network
