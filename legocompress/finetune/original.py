"""The network that a compressed one was converted from, created anew."""

from __future__ import annotations

from torch import nn

from legocompress.errors import UsageError
from legocompress.models.factory import create
from legocompress.models.source import source_of


def create_original(model: nn.Module) -> nn.Module:
    """Create the network that `model` was converted from, by the source recorded in it.

    Raises:
        UsageError: the weights of the original came from a file, were random, or are unknown.
        LegoError: as `create` raises.
    """
    source = source_of(model)
    if (
        source.library is None
        or source.weights == "unknown"
        or source.weights.startswith(("file ", "random"))
    ):
        raise UsageError(
            "the recipe distils the original network, and the checkpoint does not tell where it "
            f"is (its weights are: {source.weights}); name it with --original or "
            "--original-weights, or train on labels only with --set distill=null"
        )
    return create(source.weights, model_args=source.model_args)
