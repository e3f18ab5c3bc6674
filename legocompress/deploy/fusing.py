"""Fusing: each conv of a traced module, with what follows it, becomes one deployed layer.

Pooling, mean and linear layers become deployed layers too, a linear layer with its activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from legocompress.deploy.conv_layer import DeployedConv, is_deployable_conv
from legocompress.deploy.folding import fold_conv
from legocompress.deploy.hooks import is_hooked
from legocompress.deploy.patterns import match_activation, match_conv
from legocompress.deploy.plain_layers import (
    DeployedLinear,
    DeployedMean,
    DeployedPool,
    PlainLayer,
)
from legocompress.deploy.tracing import (
    is_called_on_map,
    only_user,
    qualified_name,
    trace_module,
)
from legocompress.lego.module import computes_plainly

DEPLOYED = "deployed"  # the module list of the deployed layers in the graph


@dataclass
class FusedGraph:
    """A traced module with deployed layers in the place of its own.

    Attributes:
        name: the module's name in the network; '' for the root.
        root: the module itself, unchanged.
        graph_module: what runs it.
        convs: its deployed convs.
        plains: its deployed pooling, mean and linear layers.
        source_convs: the convs of `root` that `convs` stand for.
        n_norms: norms that were folded.
        n_activations: activations that were fused.
        n_sums: residual sums that were fused.
    """

    name: str
    root: nn.Module
    graph_module: fx.GraphModule
    convs: list[DeployedConv] = field(default_factory=list)
    plains: list[PlainLayer] = field(default_factory=list)
    source_convs: set[nn.Module] = field(default_factory=set)
    n_norms: int = 0
    n_activations: int = 0
    n_sums: int = 0

    def undeployed_modules(self) -> Iterator[nn.Module]:
        """The modules that the graph still calls as they are."""
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module" and not _is_deployed(node):
                yield self.graph_module.get_submodule(str(node.target))


def fuse_graph(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> FusedGraph:
    """Trace a network in eval mode and replace its layers, in the graph, by deployed layers.

    The network itself is not changed: its layers' values are copied where something is folded in.

    Args:
        name: the network's own name, before those of its layers; '' for a root.
        module: the network.
        inputs: one or two tensors (N, c, H, W) to learn the sizes of its maps from.

    Raises:
        DeployError: it takes another number of inputs, changes its own buffers, or stores values
            on itself.
        Exception: whatever the network's own code raises when it is traced.
    """
    graph = FusedGraph(name, module, trace_module(module, inputs))
    graph_module = graph.graph_module
    graph_module.add_submodule(DEPLOYED, nn.ModuleList())
    deployed_convs: dict[Any, DeployedConv] = {}
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module":
            layer = graph_module.get_submodule(str(node.target))
            if is_deployable_conv(layer, allow_hooks=layer is module) and is_called_on_map(node):
                _fuse_conv_(graph, node, layer, deployed_convs)
            elif (plain := _plain_layer(name, node, layer)) is not None:
                _fuse_plain_(graph, node, plain)
    _allow_overwriting_residuals_(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph


def _fuse_conv_(
    graph: FusedGraph, node: fx.Node, layer: Any, deployed_convs: dict[Any, DeployedConv]
) -> None:
    """Replace a conv, and what follows it and reads nothing else, by one deployed layer.

    A conv that is called several times is one deployed layer for each different pattern.
    """
    pattern = match_conv(graph.graph_module, node)
    key = (layer, pattern.norm, pattern.activation, pattern.residual is not None)
    if key not in deployed_convs:
        name = qualified_name(graph.name, node)
        n_same = sum(conv.name.partition("#")[0] == name for conv in deployed_convs.values())
        folded = fold_conv(layer, pattern.norm, pattern.activation)
        conv = DeployedConv(f"{name}#{n_same + 1}" if n_same else name, folded)
        deployed_convs[key] = conv
        graph.convs.append(conv)
        graph.source_convs.add(layer)
    graph.n_norms += pattern.norm is not None
    graph.n_activations += pattern.activation != "none"
    graph.n_sums += pattern.residual is not None
    args = (node.args[0],) if pattern.residual is None else (node.args[0], pattern.residual)
    # Only where the sum stood have both of its parts been computed.
    place = node if pattern.sum_node is None else pattern.sum_node
    fused = _replace_(graph.graph_module, pattern.nodes, deployed_convs[key], args, place)
    if pattern.unfused_activation is not None:
        target = f"{pattern.nodes[1].target}.act"
        _insert_after_(graph.graph_module, fused, target, pattern.unfused_activation)


def _plain_layer(prefix: str, node: fx.Node, layer: nn.Module) -> PlainLayer | None:
    """The deployed form of a pooling, mean or linear layer; None for other layers."""
    if is_hooked(layer) or len(node.args) != 1 or node.kwargs:
        return None
    name = qualified_name(prefix, node)
    if type(layer) is nn.MaxPool2d and not layer.return_indices:
        return DeployedPool(name, layer)
    if type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)):
        return DeployedMean(name) if is_called_on_map(node) else None
    if type(layer) is nn.Linear and computes_plainly(layer):
        shape = node.args[0].meta["shape"] if isinstance(node.args[0], fx.Node) else None
        return DeployedLinear(name, layer) if len(shape or ()) == 2 else None
    return None


def _fuse_plain_(graph: FusedGraph, node: fx.Node, plain: PlainLayer) -> None:
    """Replace a pooling, mean or linear layer, the latter with the activation that follows it."""
    nodes = [node]
    if isinstance(plain, DeployedLinear):
        following = only_user(node)
        plain.activation = match_activation(graph.graph_module, following)
        if following is not None and plain.activation != "none":
            nodes.append(following)
            graph.n_activations += 1
    graph.plains.append(plain)
    _replace_(graph.graph_module, nodes, plain, (node.args[0],), node)


def _replace_(
    graph_module: fx.GraphModule,
    nodes: list[fx.Node],
    layer: nn.Module,
    args: tuple[Any, ...],
    place: fx.Node,
) -> fx.Node:
    """Put a deployed layer at `place` instead of nodes, of which others read the last one only."""
    layers: Any = graph_module.get_submodule(DEPLOYED)
    number = next((i for i, other in enumerate(layers) if other is layer), len(layers))
    if number == len(layers):
        layers.append(layer)
    with graph_module.graph.inserting_before(place):
        call = graph_module.graph.call_module(f"{DEPLOYED}.{number}", args)
    call.meta.update(nodes[-1].meta)
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        graph_module.graph.erase_node(node)
    return call


def _insert_after_(
    graph_module: fx.GraphModule, node: fx.Node, target: str, layer: nn.Module
) -> None:
    """Run a module on a node's output, for all who read that output."""
    graph_module.add_submodule(target, layer)
    with graph_module.graph.inserting_after(node):
        call = graph_module.graph.call_module(target, (node,))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call, lambda user: user is not call)


def _allow_overwriting_residuals_(graph_module: fx.GraphModule) -> None:
    """Let the layer that reads a residual last write its output into the residual's memory.

    Only where a deployed layer made the residual and only deployed layers read it, since their
    outputs share no memory with their inputs.
    """
    nodes = list(graph_module.graph.nodes)
    order = {node: place for place, node in enumerate(nodes)}
    for node in nodes:
        if not _is_deployed(node) or len(node.args) != 2:
            continue
        x, residual = node.args
        readers = residual.users
        if x is residual or not _is_deployed(residual) or not all(map(_is_deployed, readers)):
            continue
        if max(order[reader] for reader in readers) == order[node]:
            node.args = (x, residual, True)


def _is_deployed(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{DEPLOYED}.")
