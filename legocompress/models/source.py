"""Find out what rebuilds a network."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from legocompress.models.probe import model_cfg
from legocompress.state.model_state import lego_state
from legocompress.state.source import Source


def source_of(model: nn.Module) -> Source:
    """Return what rebuilds `model`.

    `create` records it on the model. For other models of timm it follows from their configuration;
    for any other network the library of the source is None.
    """
    source = lego_state(model).source
    if not isinstance(source, Source):
        architecture = model_cfg(model).get("architecture")
        if not architecture or not type(model).__module__.startswith("timm."):
            return Source(None, None)
        source = Source("timm", architecture, dict(getattr(model, "_model_args", {})))
    classes = getattr(model, "num_classes", None)
    if source.library == "timm" and isinstance(classes, int):  # timm's reset_classifier changes it
        source = replace(source, model_args={**source.model_args, "num_classes": classes})
    return source
