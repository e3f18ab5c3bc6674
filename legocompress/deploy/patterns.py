"""Patterns in a traced graph: what follows a conv and can be fused into it."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from legocompress.deploy.activation import ACTIVATIONS, Activation
from legocompress.deploy.conv_layer import DeployedConv
from legocompress.deploy.folding import is_foldable
from legocompress.deploy.hooks import is_hooked
from legocompress.deploy.plain_layers import PlainLayer
from legocompress.deploy.tracing import LEAVES, only_user
from legocompress.lego.module import computes_plainly

SUMS = (operator.add, operator.iadd, torch.add)


@dataclass
class ConvPattern:
    """A conv [+ norm] [+ residual sum] [+ activation] in a graph; `nodes` are these, in order."""

    nodes: list[fx.Node]
    norm: nn.Module | None = None
    residual: fx.Node | None = None
    sum_node: fx.Node | None = None
    activation: Activation = "none"
    # The activation inside the norm's own module, where it is not one of ours: it runs afterwards.
    unfused_activation: nn.Module | None = None


def match_conv(graph_module: fx.GraphModule, conv: fx.Node) -> ConvPattern:
    """The longest pattern that starts with a conv, each node of which reads the one before.

    Only the last node's output may be read by others.
    """
    pattern = ConvPattern([conv])
    following = only_user(conv)
    norm = _called_layer(graph_module, following)
    if following is not None and norm is not None and is_foldable(norm):
        pattern.norm = norm
        pattern.nodes.append(following)
        act = getattr(norm, "act", None)
        if act is not None and type(act) is not nn.Identity:
            # The norm's module applies it, so neither a sum nor another activation can follow.
            pattern.activation = ACTIVATIONS.get(type(act), "none")
            pattern.unfused_activation = act if pattern.activation == "none" else None
            return pattern
    following = only_user(pattern.nodes[-1])
    pattern.residual = _residual(graph_module, pattern.nodes, following)
    if pattern.residual is not None:
        assert following is not None
        pattern.sum_node = following
        pattern.nodes.append(following)
    following = only_user(pattern.nodes[-1])
    pattern.activation = match_activation(graph_module, following)
    if pattern.activation != "none":
        assert following is not None
        pattern.nodes.append(following)
    return pattern


def _residual(
    graph_module: fx.GraphModule, nodes: list[fx.Node], total: fx.Node | None
) -> fx.Node | None:
    """The other summand, if `total` adds a map of the same size to the last of `nodes`.

    None where `total` is not such a sum, or where fusing it could change the result.
    """
    if total is None or total.kwargs or len(total.args) != 2:
        return None
    method = total.op == "call_method" and total.target in ("add", "add_")
    if not method and not (total.op == "call_function" and total.target in SUMS):
        return None
    ours, other = total.args
    if other is nodes[-1]:
        if total.target in (operator.iadd, "add_"):
            return None  # it changes the other summand, which somebody may still read
        ours, other = other, ours
    if not isinstance(other, fx.Node) or ours is other:
        return None
    shape, dtype = nodes[0].meta["shape"], nodes[0].meta["dtype"]
    same = other.meta["shape"] == shape and other.meta["dtype"] == dtype
    if not same or shape[2] * shape[3] == 1:  # a 1 x 1 map may be broadcast at other sizes
        return None
    node = nodes[0].next
    while node is not total:
        if node not in nodes and may_write(graph_module, node):
            return None  # the conv would run after this node, which may change its input
        node = node.next
    return other


def may_write(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node could change, in place, a tensor that another node made."""
    if node.op == "call_module":
        layer = graph_module.get_submodule(str(node.target))
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not computes_plainly(layer):
            return True  # the network's own code may do anything
        if isinstance(layer, (*LEAVES, DeployedConv, PlainLayer)):
            return is_hooked(layer)
        plain = type(layer).__module__.startswith("torch.nn.") and not is_hooked(layer)
        return bool(getattr(layer, "inplace", not plain))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "_")
        in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv", "setitem")
        flags = (*node.args[1:], *node.kwargs.values())  # `inplace` may be any of them
        return in_place or "out" in node.kwargs or any(flag is True for flag in flags)
    return False


def match_activation(graph_module: fx.GraphModule, node: fx.Node | None) -> Activation:
    """The activation that a node applies; 'none' where it does something else."""
    if node is None:
        return "none"
    if node.op == "call_module":
        layer = _called_layer(graph_module, node)
        return ACTIVATIONS.get(type(layer), "none") if layer is not None else "none"
    if node.op in ("call_function", "call_method") and len(node.args) == 1:
        return ACTIVATIONS.get(node.target, "none") if set(node.kwargs) <= {"inplace"} else "none"
    return "none"


def _called_layer(graph_module: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    """The module without hooks that a node calls on one argument; None where it does not."""
    if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    layer = graph_module.get_submodule(str(node.target))
    return None if is_hooked(layer) else layer
