"""Activations that act on each value alone: they become clamps, or tables of 256 entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from legocompress.deploy.activation import ACTIVATIONS
from legocompress.deploy.hooks import is_hooked

Pointwise = Callable[[Tensor], Tensor]
# The largest output of the activations that only clamp.
CLAMPS: dict[str, float] = {"relu": float("inf"), "relu6": 6.0}

MODULES: tuple[type[nn.Module], ...] = (
    nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.GELU, nn.LeakyReLU, nn.ELU, nn.CELU,
    nn.SELU, nn.Mish, nn.Tanh, nn.Hardtanh, nn.Softplus, nn.ReLU, nn.ReLU6,
)  # fmt: skip
FUNCTIONS: tuple[Any, ...] = (
    F.silu, F.hardswish, F.hardsigmoid, F.sigmoid, torch.sigmoid, F.gelu, F.leaky_relu, F.elu,
    F.celu, F.selu, F.mish, torch.tanh, F.tanh, F.hardtanh, F.softplus, F.relu, torch.relu,
    torch.relu_, F.relu6,
)  # fmt: skip
METHODS = ("sigmoid", "sigmoid_", "tanh", "tanh_", "relu", "relu_")


def find_pointwise(graph_module: fx.GraphModule, node: fx.Node) -> tuple[str, Pointwise] | None:
    """The activation that a node applies to its one tensor; None where it does something else.

    Returns:
        'relu' or 'relu6', or 'table' for others, and a function of a float tensor.
    """
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        layer = graph_module.get_submodule(str(node.target))
        if type(layer) not in MODULES or is_hooked(layer) or len(node.args) != 1 or node.kwargs:
            return None
        return ACTIVATIONS.get(type(layer), "table").replace("silu", "table"), _of_module(layer)
    rest, kwargs = node.args[1:], node.kwargs
    if node.op == "call_function" and node.target in FUNCTIONS:
        target: Any = node.target
    elif node.op == "call_method" and node.target in METHODS:
        target = getattr(Tensor, str(node.target))
    else:
        return None
    kind = "table" if rest else ACTIVATIONS.get(node.target, "table").replace("silu", "table")

    def apply(x: Tensor) -> Tensor:
        return target(x.clone(), *rest, **kwargs)  # type: ignore[no-any-return]

    return kind, apply


def _of_module(layer: nn.Module) -> Pointwise:
    def apply(x: Tensor) -> Tensor:
        return layer(x.clone())  # type: ignore[no-any-return]

    return apply


def silu(x: Tensor) -> Tensor:
    """The activation that deployed layers apply under this name."""
    return F.silu(x)
