"""Networks with a training form and a fused form (RepVGG, MobileOne, FastViT, ...)."""

from __future__ import annotations

import copy

import torch
from timm.utils import reparameterize_model
from torch import nn


def has_training_form(model: nn.Module) -> bool:
    """Whether blocks of timm's have a deployed form (RepVGG, MobileOne, FastViT, LeViT, ...).

    Classes from elsewhere are left alone: a method called `fuse` may mean anything there. A block
    that has its `reparam_conv` is deployed already, and FastViT's would fail if asked again.
    """
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    return any(
        type(module).__module__.startswith("timm.")
        and getattr(module, "reparam_conv", None) is None
        and any(callable(getattr(type(module), name, None)) for name in methods)
        for module in model.modules()
    )


def fused_copy(model: nn.Module) -> nn.Module:
    """Copy a network and bring the copy into its deployed form."""
    copied = copy.deepcopy(model).eval()
    if any(parameter.is_meta for parameter in copied.parameters()):
        copied = copied.to_empty(device="cpu")  # fusing computes with the values
    with torch.random.fork_rng(devices=[]):  # fused layers draw initial weights
        return reparameterize_model(copied, inplace=True)  # type: ignore[no-any-return]
