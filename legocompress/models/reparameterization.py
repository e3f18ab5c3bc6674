"""Networks with a training form and a fused form (RepVGG, MobileOne, FastViT, ...)."""

from __future__ import annotations

import copy

import torch
from timm.utils import reparameterize_model
from torch import nn


def has_training_form(model: nn.Module) -> bool:
    """Whether the model has blocks of timm that can be fused (RepVGG, MobileOne, FastViT, ...).

    Classes of other libraries are left alone, since a method called `fuse` may mean anything there.
    A block with a `reparam_conv` is fused already, and FastViT's would fail if fused again.
    """
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    return any(
        type(module).__module__.startswith("timm.")
        and getattr(module, "reparam_conv", None) is None
        and any(callable(getattr(type(module), name, None)) for name in methods)
        for module in model.modules()
    )


def fused_copy(model: nn.Module) -> nn.Module:
    """Copy a network and fuse the blocks of the copy."""
    copied = copy.deepcopy(model).eval()
    if any(parameter.is_meta for parameter in copied.parameters()):
        copied = copied.to_empty(device="cpu")  # fusing computes with values
    with torch.random.fork_rng(devices=[]):  # fused layers are initialised at random
        return reparameterize_model(copied, inplace=True)  # type: ignore[no-any-return]
