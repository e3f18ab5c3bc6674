"""From a graph of fp32 layers to one of integer operators, with conversions between both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from legocompress.errors import CheckpointError
from legocompress.quantize import builder
from legocompress.quantize.assignment import Assignment
from legocompress.quantize.integer_graph import IntegerGraph, is_size
from legocompress.quantize.layers import (
    AddLayer,
    CatLayer,
    ConvLayer,
    FloatLayer,
    GateLayer,
    LinearLayer,
    MeanLayer,
    PointwiseLayer,
    PoolLayer,
)
from legocompress.quantize.operators import (
    DequantizeMap,
    IntegerAdd,
    IntegerCat,
    IntegerConvLayer,
    IntegerGate,
    IntegerLinearLayer,
    IntegerMean,
    IntegerOperator,
    IntegerPool,
    IntegerTable,
    QuantizeMap,
)
from legocompress.quantize.sources import round_weight
from legocompress.state.quantization import ConvShifts, MapRange

OPERATORS = "integer"  # the module list of the integer operators in the graph


def lower_graph(
    graph: IntegerGraph,
    assignment: Assignment,
    ranges: Mapping[str, MapRange],
    shifts: Mapping[str, ConvShifts],
) -> fx.GraphModule:
    """Build the graph that computes in integers.

    Args:
        graph: the network in fp32.
        assignment: the roles of its nodes.
        ranges: of the maps that the assignment needs, by name.
        shifts: of the convs, by name.

    Raises:
        CheckpointError: a range or shifts are missing or do not fit.
    """
    return Lowering(graph, assignment, ranges, shifts).run()


class Lowering:
    """Copies a graph node by node; each value exists as float, as uint8, or as both."""

    def __init__(
        self,
        graph: IntegerGraph,
        assignment: Assignment,
        ranges: Mapping[str, MapRange],
        shifts: Mapping[str, ConvShifts],
    ) -> None:
        self.source, self.assignment = graph, assignment
        self.ranges, self.shifts = ranges, shifts
        self.graph = fx.Graph()
        self.operators = nn.ModuleList()
        self.floats: dict[fx.Node, fx.Node] = {}
        self.integers: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        """Build the lowered graph."""
        for node in self.source.nodes:
            if node in self.assignment.integer:
                self._lower(node)
            elif is_size(node) and node.args[0] in self.integers:
                self.floats[node] = self.graph.node_copy(node, self.as_integer)
            else:
                self.floats[node] = self.graph.node_copy(node, self.as_float)
        root = dict(self.source.graph_module.named_modules())
        attributes: dict[str, Any] = {
            str(node.target): root.get(str(node.target))
            for node in self.graph.nodes
            if node.op == "call_module" and not str(node.target).startswith(f"{OPERATORS}.")
        }
        for node in self.graph.nodes:
            if node.op == "get_attr":
                attributes[str(node.target)] = _attribute(self.source.graph_module, node.target)
        attributes.update({f"{OPERATORS}.{i}": op for i, op in enumerate(self.operators)})
        self.graph.lint()
        return fx.GraphModule(attributes, self.graph)

    def range_named(self, name: str) -> MapRange:
        """The range of a name."""
        if name not in self.ranges:
            raise CheckpointError(f"quantisation: the range of {name!r} is missing")
        return self.ranges[name]

    def range_of(self, node: fx.Node) -> MapRange:
        """The range of the output of a node."""
        return self.range_named(self.assignment.names[node])

    def call(self, operator: IntegerOperator, args: tuple[fx.Node, ...]) -> fx.Node:
        """Add a node that calls an operator."""
        self.operators.append(operator)
        return self.graph.call_module(f"{OPERATORS}.{len(self.operators) - 1}", args)

    @staticmethod
    def describe(call: fx.Node, node: fx.Node) -> None:
        """Note the shape of a map at a conversion of it."""
        call.meta["shape"] = node.meta.get("shape")
        call.meta["n_axes"] = len(node.meta.get("shape") or ())

    def as_float(self, node: fx.Node) -> fx.Node:
        """The float output of a node of the source."""
        if node not in self.floats:
            name = self.assignment.names[node]
            operator = DequantizeMap(name, self.range_of(node))
            self.floats[node] = self.call(operator, (self.integers[node],))
            self.describe(self.floats[node], node)
        return self.floats[node]

    def as_integer(self, node: fx.Node) -> fx.Node:
        """The rounded output of a node of the source."""
        if node not in self.integers:
            operator = QuantizeMap(self.assignment.names[node], self.range_of(node))
            self.integers[node] = self.call(operator, (self.floats[node],))
            self.describe(self.integers[node], node)
        return self.integers[node]

    def _lower(self, node: fx.Node) -> None:
        layer = self.source.layer(node)
        if layer is None:  # other arguments of what moves values are sizes
            self.integers[node] = self.graph.node_copy(
                node, lambda x: self.as_integer(x) if x is node.args[0] else self.as_float(x)
            )
            return
        args = tuple(map(self.as_integer, node.all_input_nodes))
        if len(node.all_input_nodes) != len(node.args):  # one map is read twice
            args = tuple(self.as_integer(x) for x in node.args)  # type: ignore[arg-type]
        operator = self.make_operator(node, layer)
        if not isinstance(layer, LinearLayer):
            operator.out_zero = self.range_of(node).zero
        call = self.call(operator, args)
        call.meta.update(node.meta)
        (self.floats if isinstance(layer, LinearLayer) else self.integers)[node] = call

    def make_operator(self, node: fx.Node, layer: FloatLayer) -> IntegerOperator:
        """The operator of a node that has an integer form."""
        inputs: list[Any] = list(node.args)
        x = self.range_of(inputs[0])
        if isinstance(layer, ConvLayer):
            return self._conv(node, layer, x)
        if isinstance(layer, LinearLayer):
            linear = layer.layer[0]
            values, scales = round_weight(linear)
            built = builder.build_linear(values, scales, linear.bias, x)
            return IntegerLinearLayer(layer.name, built, layer.activation)
        if isinstance(layer, PoolLayer):
            return IntegerPool(layer.name, layer.arguments)
        if isinstance(layer, CatLayer):
            return IntegerCat(layer.name, layer.axis)
        y = self.range_of(node)
        if isinstance(layer, MeanLayer):
            return IntegerMean(layer.name, x, y, layer.keeps_axes)
        if isinstance(layer, PointwiseLayer):
            return IntegerTable(layer.name, builder.build_table(layer.pointwise, x, y))
        other = self.range_of(inputs[1])
        if isinstance(layer, AddLayer):
            return _add(layer, x, other, y)
        assert isinstance(layer, GateLayer)
        return _gate(layer, x, other, y)

    def _conv(self, node: fx.Node, layer: ConvLayer, x: MapRange) -> IntegerOperator:
        y, table = self.range_of(node), None
        if layer.pointwise is not None:
            before = self.range_named(layer.pre_name)
            y, table = before, builder.build_table(layer.pointwise, before, y)
        if layer.name not in self.shifts:
            raise CheckpointError(f"quantisation: the shifts of {layer.name!r} are missing")
        residual = self.range_of(node.args[1]) if len(node.args) > 1 else None  # type: ignore[arg-type]
        conv = builder.build_conv(
            layer.name,
            layer.source,
            x,
            y,
            self.shifts[layer.name],
            clamp=layer.clamp,
            residual=residual,
            table=table,
        )
        return IntegerConvLayer(layer.name, conv, layer.source.geometry)


def _add(layer: AddLayer, a: MapRange, b: MapRange, y: MapRange) -> IntegerAdd:
    shift = builder.add_shift(a, b, y) or 0
    multipliers = tuple(builder.map_multiplier(x, y, shift) for x in (a, b))
    bias = builder.real_bias(y, shift)
    bounds = builder.clamp_bounds(layer.clamp, y)
    return IntegerAdd(layer.name, (a.zero, b.zero), multipliers, bias, shift, bounds)  # type: ignore[arg-type]


def _gate(layer: GateLayer, x: MapRange, gate: MapRange, y: MapRange) -> IntegerGate:
    shift = builder.gate_shift(x, gate, y) or 0
    multiplier = builder.gate_multiplier(x, gate, y, shift)
    bias = builder.real_bias(y, shift)
    return IntegerGate(layer.name, (x.zero, gate.zero), multiplier, bias, shift)


def _attribute(module: Any, target: Any) -> Any:
    for name in str(target).split("."):
        module = getattr(module, name)
    return module
