"""Replace the classifier of a network that will learn other classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

from legocompress.errors import UsageError
from legocompress.lego.module import LegoModule
from legocompress.models.factory import build
from legocompress.models.probe import model_cfg
from legocompress.models.source import source_of
from legocompress.state.model_state import lego_state


def reset_classifier_(model: nn.Module, num_classes: int, seed: int = 0) -> nn.Module:
    """Give a network of timm or torchvision a new classifier with random weights, in place.

    The same architecture is built with `num_classes` outputs. Modules whose shape differs there are
    taken from it; everything else stays.

    Raises:
        UsageError: the architecture is unknown or takes no num_classes, or the classifier is a
            Lego module.
    """
    source = source_of(model)
    if source.library is None:
        raise UsageError("replace the classifier of your own network in Python, before training")
    source = replace(source, model_args={**source.model_args, "num_classes": num_classes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build(source)
        if source.reparameterized:
            fresh = reparameterize_model(fresh.eval(), inplace=True)
    ours = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        lego = isinstance(module, LegoModule) and leaf == "weight"
        shape = module.weight.shape if lego else ours[name].shape
        if shape == parameter.shape:
            continue
        if isinstance(module, LegoModule):
            raise UsageError(
                f"the classifier {owner!r} is a Lego module, so it cannot be replaced; convert "
                "after training, or with --skip for that layer"
            )
        parent, _, last = owner.rpartition(".")
        setattr(model.get_submodule(parent), last, fresh.get_submodule(owner).to(parameter.device))
    network: Any = model.to(next(iter(ours.values())).device)
    network.num_classes = num_classes
    lego_state(model).source = source
    network.pretrained_cfg = {**model_cfg(model), "num_classes": num_classes}
    return model
