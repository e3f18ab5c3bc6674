"""Options that name the original network of a compressed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from torch import nn

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.models.source import source_of

from .common import CommandT, combine_options

original_options: Callable[[CommandT], CommandT] = combine_options(
    [
        click.option("--original", help="The original network: a model name or a folder."),
        click.option(
            "--original-weights",
            type=click.Path(path_type=Path),
            help="Weights file of the original network, whose architecture the folder names.",
        ),
    ]
)


def open_original(network: nn.Module, name: str | None, weights: Path | None) -> nn.Module | None:
    """Open the original of a compressed network by name or weights; None if neither is given.

    Raises:
        UsageError: only `weights` is given, and the network's architecture is unknown.
    """
    if name is None and weights is None:
        return None
    if name is not None:
        return lego.open_model(name, weights=weights)
    source = source_of(network)
    if source.library is None:
        raise UsageError("--original-weights needs a known architecture; name it with --original")
    full_name = f"{source.library}/{source.architecture}"
    return lego.create(full_name, weights=weights, model_args=source.model_args)


def create_recorded_original(network: nn.Module) -> nn.Module:
    """Create the original by the name that the compressed folder records.

    Raises:
        UsageError: the folder records no name, because its weights came from a file or are random.
    """
    source = source_of(network)
    if source.library is None or source.weights.partition(" ")[0] in ("file", "random,", "unknown"):
        raise UsageError(
            f"the original's weights are recorded as {source.weights!r}, which is not a name that "
            "can be loaded; give the original with --original or --original-weights"
        )
    return lego.create(source.weights, model_args=source.model_args)
