"""Choose which layers' filters the page shows, and draw them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from legocompress.errors import UsageError
from legocompress.lego.module import LegoModule, lego_modules
from legocompress.report.html.pictures import (
    FilterPicture,
    Picture,
    cut_corner,
    draw_filters,
    draw_weight,
)
from legocompress.report.results import LayerReport

N_WORST = 3


@dataclass(frozen=True)
class LayerFilters:
    """The Lego filters of one layer; `drawn` is None where the page has no room for a picture."""

    row: LayerReport
    drawn: FilterPicture | None


@dataclass(frozen=True)
class Pair:
    """A part of a layer's original weight, of the assembled one, and of their difference.

    `parts` has a caption and a picture for each; all have the same scale of colours. `shown` and
    `whole` are the output and input channels of the part and of the whole weight.
    """

    row: LayerReport
    choice: str
    parts: tuple[tuple[str, Picture], ...]
    shown: tuple[int, int]
    whole: tuple[int, int]


def check_original(model: nn.Module, original: nn.Module) -> None:
    """Check that a network has the layers that another one was converted from.

    Raises:
        UsageError: a converted layer is missing in it, or has another shape.
    """
    for name, expected, shape in _compare_shapes(model, original):
        if shape != expected:
            raise UsageError(
                f"the original's layer {name!r} has "
                + ("no weight" if shape is None else f"a weight of shape {shape}")
                + f", the compressed one a weight of shape {expected}; name the network that it "
                "was converted from"
            )


def is_original(model: nn.Module, network: nn.Module) -> bool:
    """Whether a network has the layers that the compressed `model` was converted from."""
    return all(shape == expected for _, expected, shape in _compare_shapes(model, network))


def _compare_shapes(
    model: nn.Module, original: nn.Module
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
    """Yield each Lego layer's name, the shape of its weight, and that of the original's weight."""
    modules = dict(original.named_modules())
    for name, layer in lego_modules(model):
        weight = getattr(modules.get(name), "weight", None)
        unit = layer.lego_shape
        kernel = () if isinstance(layer, nn.Linear) else unit.kernel
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        yield name, (unit.n_out, unit.channels, *kernel), shape


def draw_all_filters(
    model: nn.Module, rows: Sequence[LayerReport], picture_bytes: int
) -> list[LayerFilters]:
    """Draw the Lego filters of the converted layers, in the order of the rows.

    Layers after the first `picture_bytes` of pictures get none.
    """
    modules = dict(lego_modules(model))
    gallery = []
    for row in rows:
        if row.name not in modules:
            continue
        drawn = draw_filters(modules[row.name]) if picture_bytes > 0 else None
        gallery.append(LayerFilters(row, drawn))
        picture_bytes -= 0 if drawn is None else len(drawn.picture.uri)
    return gallery


def draw_pairs(
    model: nn.Module, original: nn.Module | None, rows: Sequence[LayerReport]
) -> list[Pair]:
    """Draw original and assembled filters of the first converted layer and of the worst ones.

    The worst have the largest weight error.
    """
    if original is None:
        return []
    modules = dict(lego_modules(model))
    converted = [row for row in rows if row.name in modules]
    worst = sorted(converted[1:], key=lambda row: -(row.weight_error or 0.0))[:N_WORST]
    chosen = [(row, "the first converted layer, weight error") for row in converted[:1]]
    chosen += [(row, "one of the largest weight errors") for row in worst]
    return [_draw_pair(row, choice, modules[row.name], original) for row, choice in chosen]


def _draw_pair(row: LayerReport, choice: str, layer: LegoModule, original: nn.Module) -> Pair:
    before = original.get_submodule(row.name).weight
    assert isinstance(before, Tensor)  # `check_original` has looked
    before = before.detach()
    after = layer.weight.detach()
    corner = cut_corner(before)
    scale = float(torch.quantile(corner.abs().flatten(), 0.99))
    after = after.to(before)
    return Pair(
        row,
        choice,
        (
            ("original", draw_weight(before, scale)),
            ("assembled", draw_weight(after, scale)),
            ("difference", draw_weight(after - before, scale)),
        ),
        (corner.shape[0], corner.shape[1]),
        (before.shape[0], before.shape[1]),
    )
