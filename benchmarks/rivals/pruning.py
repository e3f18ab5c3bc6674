"""Structured pruning by group magnitude (Fang et al., 2023; torch-pruning)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.rivals.shrunk import Shrink, Shrunk, get_convs
from legocompress.calibrate.moments import Moments
from legocompress.models.probe import default_input

MAX_PRUNED = 0.95  # of a layer, where layers are ranked together


@torch.enable_grad()  # by which torch-pruning finds which channels belong together
def prune(together: bool, original: nn.Module, names: Sequence[str], ratio: float) -> Shrunk:
    """Remove the output channels of least group magnitude, ranked per layer or all together.

    Args:
        together: rank the channels of all layers together.
        original: the network, which stays as it is.
        names: the layers that may be pruned.
        ratio: the share of the channels that stays.
    """
    import torch_pruning as tp

    network = copy.deepcopy(original)
    names_of = {module: name for name, module in network.named_modules()}
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    pruner = tp.pruner.BasePruner(
        network,
        default_input(network),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=together,
        pruning_ratio=1 - ratio,
        max_pruning_ratio=MAX_PRUNED,
        ignored_layers=[m for m in layers if names_of[m] not in names],
    )
    channels: dict[str, Tensor] = {}
    for group in pruner.step(interactive=True):
        for dependency, removed in group:
            name = names_of.get(dependency.target.module, "")
            if name in names and dependency.handler == tp.prune_conv_out_channels:
                n_out = get_convs(original, [name])[name].out_channels
                left = channels.get(name, torch.arange(n_out))
                channels[name] = left[~torch.isin(torch.arange(len(left)), torch.tensor(removed))]
        group.prune()
    return Shrunk(network, copy.deepcopy(network), _fit, channels)


def _fit(student: nn.Module, name: str, moments: Moments, held_out: Moments) -> None:
    """Fit the layer by least squares, where the held-out moments say that it is better."""
    weight = get_convs(student, [name])[name].weight.data
    solved = moments.solve()
    if held_out.error(solved) < held_out.error(weight.flatten(1)[None]):
        weight.copy_(solved.reshape(weight.shape))


PRUNING: dict[str, Shrink] = {
    "by layer": partial(prune, False),
    "all together": partial(prune, True),
}
