"""Tracing a module in eval mode to an fx graph that knows the shape of every tensor."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import is_dataclass
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torchvision.ops import FrozenBatchNorm2d

from legocompress.deploy.hooks import is_hooked
from legocompress.deploy.module_state import AttributeRecord
from legocompress.errors import DeployError

# Modules that stay one node of the graph; fx itself keeps those that are defined in torch.nn.
LEAVES = (_ConvNd, nn.Linear, _BatchNorm, FrozenBatchNorm2d)
# Modules that return their input in eval mode.
PASS_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout2d)
ROOT = "net"  # the traced module's name in the graph, before those of its parts


class _OneInput(nn.Module):
    """Calls a network of one input, so that the network itself can be a leaf of the trace."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor) -> Any:
        return self.net(a)


class _TwoInputs(_OneInput):
    def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
        return self.net(a, b)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (*LEAVES, *get_notrace_modules())

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, self._leaves) or super().is_leaf_module(module, name):
            return True
        return name != ROOT and is_hooked(module)

    def create_arg(self, a: Any) -> Any:
        """Make an argument of a node; ordered dicts and dataclasses that are dicts keep their type.

        fx alone would turn both into plain dicts, whose fields have no attributes.
        """
        if is_dataclass(a) and isinstance(a, dict):
            members = {key: self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), members)
        if type(a) is OrderedDict:
            members = super().create_arg(dict(a))
            return self.create_node("call_function", OrderedDict, (members,), {})
        return super().create_arg(a)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if (
            type(m).__call__ is not nn.Module.__call__
        ):  # it would run once here and once in the graph
            raise DeployError(f"{type(m).__name__} has a __call__ of its own")
        # The hooks of the network itself run around the deployed forward, so they are not traced.
        return super().call_module(m, m.forward if m is self.root.net else forward, args, kwargs)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and stores the shape and dtype of every tensor in its node."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        node.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
        node.meta["dtype"] = result.dtype if isinstance(result, Tensor) else None
        return result


def trace_module(module: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace a module in eval mode; every node's `meta` has the 'shape' and 'dtype' of its tensor.

    Args:
        module: the network or a part of it; it is not changed.
        inputs: one or two tensors (N, c, H, W) to run it on.

    Raises:
        DeployError: it takes another number of inputs, changes its own buffers, or stores values
            on itself.
        Exception: whatever the module's own code raises when it is traced.
    """
    if len(inputs) not in (1, 2):
        raise DeployError(f"only networks of one or two inputs are traced, not {len(inputs)}")
    if isinstance(module, tuple(get_notrace_modules())):
        raise DeployError(f"timm says that {type(module).__name__} cannot be traced")
    entry = _OneInput(module) if len(inputs) == 1 else _TwoInputs(module)
    traced = fx.GraphModule(entry, _trace_without_side_effects(entry))
    with torch.no_grad():
        _ShapeRecorder(traced).run(*inputs)
    _remove_pass_through_(traced)
    return traced


def _trace_without_side_effects(entry: nn.Module) -> fx.Graph:
    """Trace; DeployError if that changed a buffer or an attribute, which gets its value back."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in entry.buffers()]
    attributes = AttributeRecord(entry)
    try:
        graph = _Tracer().trace(entry)
    finally:
        stored = attributes.restore_()
        changed = [(buffer, value) for buffer, count, value in before if buffer._version != count]
        for buffer, value in changed:
            buffer.copy_(value)
    if changed:
        raise DeployError("its forward pass changes its buffers")
    if stored:
        name = stored[0].removeprefix(ROOT).removeprefix(".")
        raise DeployError(f"its forward pass stores a value on the network, {name}")
    return graph


def _remove_pass_through_(traced: fx.GraphModule) -> None:
    """Remove the modules that return their input, which would separate a conv from its norm."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module":
            layer = traced.get_submodule(str(node.target))
            if type(layer) in PASS_THROUGH and not layer.training and not is_hooked(layer):
                node.replace_all_uses_with(node.args[0])
                traced.graph.erase_node(node)


def qualified_name(prefix: str, node: fx.Node) -> str:
    """The name of the module that a node calls, in the network in which `prefix` is the root's."""
    name = str(node.target).removeprefix(ROOT).removeprefix(".")
    return ".".join(part for part in (prefix, name) if part)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads a node's output; None where there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_called_on_map(node: fx.Node) -> bool:
    """Whether a node has one argument, a feature map (N, c, H, W)."""
    args = node.args
    return len(args) == 1 and isinstance(args[0], fx.Node) and len(args[0].meta["shape"] or ()) == 4
