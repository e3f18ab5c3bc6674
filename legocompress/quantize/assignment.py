"""Which nodes of a graph compute in integers, and which tensors must share one range."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from legocompress.deploy.patterns import may_write
from legocompress.errors import DeployError
from legocompress.quantize.integer_graph import IntegerGraph, is_move
from legocompress.quantize.layers import (
    CatLayer,
    ClampedLayer,
    ConvLayer,
    FloatLayer,
    LinearLayer,
    PoolLayer,
)

STARTS = (ConvLayer, LinearLayer)  # what is integer whatever it reads


@dataclass
class Assignment:
    """The roles of the nodes of a graph.

    Attributes:
        integer: nodes with an integer form, those that move values included.
        names: of each node whose output may be uint8, the name of its range; nodes that share a
            range have one name.
        needed: the names of the ranges that the integer nodes use.
    """

    integer: set[fx.Node]
    names: dict[fx.Node, str]
    needed: set[str]


def assign_roles(graph: IntegerGraph, excluded: Collection[str] = ()) -> Assignment:
    """Find the integer nodes of a graph and the names of the ranges that they need.

    Convs and linear layers are integer; other operators only if they read an integer node, and an
    integer node reads them.

    Args:
        graph: the traced network.
        excluded: names of the layers that compute in fp32.

    Raises:
        DeployError: a node may change, in place, a map that others read later.
    """
    integer: set[fx.Node] = set()
    for node in graph.nodes:
        layer = graph.layer(node)
        if layer is None:
            reads_integer = node.args and node.args[0] in integer
            if reads_integer and is_move(graph.graph_module, node):
                integer.add(node)
            elif may_write(graph.graph_module, node) and not _is_weight_layer(graph, node):
                _check_write(node)
        elif layer.name not in excluded:
            starts = isinstance(layer, STARTS)
            if starts or any(_is_uint8(graph, x, integer) for x in node.all_input_nodes):
                integer.add(node)
    for node in reversed(graph.nodes):  # logits keep more than 8 bits
        starts = isinstance(graph.layer(node), STARTS)
        if node in integer and not starts and not any(user in integer for user in node.users):
            integer.remove(node)
    return Assignment(integer, *_name_ranges(graph, integer))


def _is_uint8(graph: IntegerGraph, node: fx.Node, integer: set[fx.Node]) -> bool:
    return node in integer and not isinstance(graph.layer(node), LinearLayer)


def _is_weight_layer(graph: IntegerGraph, node: fx.Node) -> bool:
    """Whether a node calls a conv or linear layer, none of which writes into its input."""
    if node.op != "call_module":
        return False
    layer = graph.graph_module.get_submodule(str(node.target))
    return isinstance(layer, (nn.Conv2d, nn.Linear))


def _check_write(node: fx.Node) -> None:
    order = {other: place for place, other in enumerate(node.graph.nodes)}
    for x in node.all_input_nodes:
        if any(order[user] > order[node] for user in x.users):
            raise DeployError(f"{node.name} may change a map in place that is read afterwards")


def _name_ranges(graph: IntegerGraph, integer: set[fx.Node]) -> tuple[dict[fx.Node, str], set[str]]:
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while parent.setdefault(node, node) is not node:
            node = parent[node]
        return node

    for node in graph.nodes:
        layer = graph.layer(node)
        shares = isinstance(layer, (CatLayer, PoolLayer)) or layer is None
        if node in integer and shares:
            inputs = node.all_input_nodes if layer is not None else [node.args[0]]
            for x in inputs:  # the first node of a group gives it its name
                one, two = find(x), find(node)  # type: ignore[arg-type]
                parent[two] = one
    names = {node: _own_name(graph, find(node)) for node in graph.nodes}
    needed: set[str] = set()
    for node in integer:
        layer = graph.layer(node)
        if layer is None:
            continue
        needed.update(names[x] for x in node.all_input_nodes)
        if not isinstance(layer, LinearLayer):
            needed.add(names[node])
        if isinstance(layer, ClampedLayer) and layer.pointwise is not None:
            needed.add(layer.pre_name)
    return names, needed


def _own_name(graph: IntegerGraph, node: fx.Node) -> str:
    layer: Any = graph.layer(node)
    if isinstance(layer, FloatLayer):
        return layer.name
    return f"{graph.name}:{node.name}" if graph.name else node.name
