"""Try out, on copies, whether a layer with a computation of its own works with a Lego weight."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from legocompress.errors import first_line
from legocompress.lego.module import LegoModule, computes_plainly
from legocompress.lego.shape import UnitShape
from legocompress.lego.surgery import become_lego_
from legocompress.lego.unit import LegoUnit

# Largest difference of the two copies, relative to the largest output: rounding in 16 bits.
TOLERANCE = 5e-2


def explain_name_clash(layer: nn.Module) -> str | None:
    """Say which attribute of a layer the Lego module would take over; None where there is none."""
    names = {*LegoModule.__annotations__, *vars(LegoModule)} - {"weight", "bias"}
    for name in sorted(names):
        shared = hasattr(nn.Linear, name) or hasattr(nn.Conv2d, name) or name.startswith("__")
        if not shared and hasattr(layer, name):
            return f"it has an attribute {name!r} of its own, which a Lego layer needs"
    return None


@torch.no_grad()
def explain_custom_computation(layer: nn.Conv2d | nn.Linear) -> str | None:
    """Say why a layer would compute wrongly as a Lego layer; None where nothing is known.

    A layer whose class or instance changes the computation is copied twice. Both copies get the
    same new weight, one of them as a Lego layer, and run on the same random input. They differ
    where the layer gets at its weight otherwise than by reading `weight`, for instance by a second
    reference, or where it writes to it. A layer that has no values yet, cannot be copied, or does
    not run on a random input alone is not judged.
    """
    if computes_plainly(layer) or any(p.is_meta for p in layer.parameters()):
        return None
    try:
        dense, lego_layer = (_bare_copy(layer) for _ in range(2))
        weight = _random(layer, *layer.weight.shape)
        dense.weight.data.copy_(weight)
        x = _random(layer, *_input_shape(layer))
        expected = _run(dense, x)
    # The layer's own code may refuse a copy or such an input with any exception.
    except Exception:
        return None
    name = type(layer).__name__
    try:
        actual = _run(become_lego_(lego_layer, *_exact_unit(weight, layer)), x)
    except Exception as error:
        return f"{name} does not run with an assembled weight: {first_line(error)}"
    if len(expected) == len(actual) and all(map(_agree, expected, actual)):
        return None
    return (
        f"{name} computes by more than reading its weight, so an assembled one gives other outputs"
    )


def _bare_copy(layer: nn.Conv2d | nn.Linear) -> Any:
    """A copy in eval mode without hooks, which may count calls."""
    copied = copy.deepcopy(layer).eval()
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()
    return copied


def _random(layer: nn.Module, *size: int) -> Tensor:
    weight: Any = layer.weight
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator).to(weight)


def _input_shape(layer: nn.Conv2d | nn.Linear) -> tuple[int, ...]:
    """Two images a little larger than the reach of the filters, or two rows."""
    if isinstance(layer, nn.Linear):
        return (2, layer.in_features)
    kernel = layer.weight.shape[2:]
    steps = layer.dilation if isinstance(layer.dilation, tuple) else (layer.dilation,) * 2
    sides = (step * (size - 1) + 6 for size, step in zip(kernel, steps, strict=True))
    return (2, layer.in_channels, *sides)


def _exact_unit(weight: Tensor, layer: nn.Conv2d | nn.Linear) -> tuple[UnitShape, LegoUnit]:
    """A unit that assembles to a weight exactly: one Lego filter for each output channel."""
    n_out, channels = weight.shape[:2]
    kernel = (int(weight.shape[2]), int(weight.shape[3])) if weight.dim() == 4 else (1, 1)
    shape = UnitShape(n_out, channels, kernel, int(getattr(layer, "groups", 1)), n_out, 1, 1)
    index = torch.arange(n_out).reshape(1, n_out, 1)
    return shape, LegoUnit(weight.reshape(n_out, channels, *kernel), index, None)


def _run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [y for y in tree_leaves(layer(x.clone())) if isinstance(y, Tensor)]


def _agree(expected: Tensor, actual: Tensor) -> bool:
    if expected.shape != actual.shape:
        return False
    gap = (expected.double() - actual.double()).abs().nan_to_num()
    return not gap.numel() or bool(gap.max() <= TOLERANCE * expected.double().abs().max())
