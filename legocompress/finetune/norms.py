"""BatchNorm in training: whose statistics normalise, and their averages over processes."""

from __future__ import annotations

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from legocompress.errors import UsageError
from legocompress.finetune.distributed import Processes
from legocompress.finetune.recipe import Recipe


def synchronise_norms_(
    model: nn.Module, recipe: Recipe, processes: Processes, device: torch.device
) -> nn.Module:
    """Make BatchNorm use the statistics of all processes, if the recipe's `norm_stats` is `sync`.

    Raises:
        UsageError: the device is not a GPU.
    """
    if recipe.norm_stats != "sync" or processes.size == 1:
        return model
    if device.type != "cuda":
        raise UsageError("norm_stats: sync works on GPUs only; use 'batch' or 'frozen'")
    return convert_sync_batchnorm(model)  # type: ignore[no-any-return]


def set_training_mode_(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Put the network in training mode, but not its BatchNorms if `norm_stats` is `frozen`."""
    model.train()
    if recipe.norm_stats == "frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return model


def average_norm_statistics_(model: nn.Module, processes: Processes) -> nn.Module:
    """Average the running statistics of BatchNorm over all processes."""
    if processes.size > 1:
        distribute_bn(model, processes.size, reduce=True)
    return model
