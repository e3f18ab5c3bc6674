"""From a quantised network to one in float32 that rounds where the integers do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from legocompress.deploy import undeploy_
from legocompress.errors import QuantizationError
from legocompress.export.program import Form, Hollow, join_name
from legocompress.export.qdq_layers import (
    PlainConv,
    RoundedConv,
    RoundedLayer,
    RoundedLinear,
    RoundedMap,
)
from legocompress.lego.surgery import to_dense_
from legocompress.quantize.assignment import Assignment, assign_roles
from legocompress.quantize.forward import (
    QuantizedForward,
    set_exact_,
    uninstall_parts_,
)
from legocompress.quantize.integer_graph import IntegerGraph
from legocompress.quantize.layers import ConvLayer, FloatLayer, LinearLayer
from legocompress.quantize.lowering import Lowering
from legocompress.quantize.operators import IntegerOperator
from legocompress.state.quantization import MapRange

GRAPH = "rounded_graph"  # the part of a module that runs in its place


@dataclass(frozen=True)
class RoundedNetwork:
    """A quantised network in float32.

    Attributes:
        emulation: a copy of the network that computes in integers, in eval mode.
        hollow: the same in float32 with rounding; its last argument is the stored tensors.
        tensors: the stored tensors, by their name in the module.
        names: what each is called in a file, in the same order.
    """

    emulation: nn.Module
    hollow: Hollow
    tensors: dict[str, Tensor]
    names: list[str]


class _RoundedLowering(Lowering):
    """Lowers a graph to layers in float32 with rounded outputs."""

    def __init__(
        self,
        graph: IntegerGraph,
        assignment: Assignment,
        ranges: Mapping[str, MapRange],
        form: Form,
    ) -> None:
        super().__init__(graph, assignment, ranges, {})
        self.form: Form = form

    def as_float(self, node: fx.Node) -> fx.Node:
        """A rounded map is in float32 already."""
        return self.floats[node] if node in self.floats else self.integers[node]

    def as_integer(self, node: fx.Node) -> fx.Node:
        """Round a map where it is not."""
        if node not in self.integers:
            operator = RoundedMap(self.assignment.names[node], self.range_of(node))
            self.integers[node] = self.call(operator, (self.floats[node],))
        return self.integers[node]

    def make_operator(self, node: fx.Node, layer: FloatLayer) -> IntegerOperator:
        """The rounding layer of a node."""
        inputs: list[Any] = list(node.args)
        if isinstance(layer, LinearLayer):
            return RoundedLinear(layer, self.range_of(inputs[0]))
        out = self.range_of(node)
        if not isinstance(layer, ConvLayer):
            return RoundedLayer(layer, out)
        before = None if layer.pointwise is None else self.range_named(layer.pre_name)
        residual = self.range_of(inputs[1]) if len(inputs) > 1 else None
        return RoundedConv(layer, self.form, self.range_of(inputs[0]), out, before, residual)


def build_rounded_network(model: nn.Module, form: Form) -> RoundedNetwork:
    """Rebuild a quantised network in float32; it is not changed.

    Layers that stay in fp32 hold dense weights, whatever the form.

    Raises:
        QuantizationError: the network has changed since `quantize_`.
        CheckpointError: the record does not fit the network.
    """
    emulation = undeploy_(copy.deepcopy(model)).eval()
    copied = copy.deepcopy(emulation)
    graphs = {}
    for name, module in copied.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, QuantizedForward):
            if not forward.is_ready():
                raise QuantizationError(
                    f"export_onnx: the network has changed since quantize_ ({forward.off_grid}); "
                    "call unquantize_ and then quantize_ to quantise it as it is now"
                )
            graphs[name] = _lower_part(forward, form)
    uninstall_parts_(copied)
    modules = dict(copied.named_modules())
    parts = {modules[name]: graph for name, graph in graphs.items()}
    copied = to_dense_(copied).float().cpu().eval()
    for module, graph in parts.items():
        module.add_module(GRAPH, graph)
        module.__dict__["forward"] = graph.forward
    tensors, names = {}, []
    for path, layer in copied.named_modules():
        if isinstance(layer, (RoundedConv, RoundedLinear)):
            for leaf, tensor in layer.named_buffers():
                tensors[join_name(path, leaf)] = tensor.clone()
                names.append(join_name(layer.name, leaf))
    for path in tensors:
        owner, _, leaf = path.rpartition(".")
        setattr(copied.get_submodule(owner), leaf, torch.empty(0, dtype=tensors[path].dtype))
    return RoundedNetwork(emulation, Hollow(copied, {}), tensors, names)


def _lower_part(forward: QuantizedForward, form: Form) -> fx.GraphModule:
    graph = forward.trace()
    set_exact_(graph, forward.part.float_layers)
    assignment = assign_roles(graph, forward.part.float_layers)
    lowered = _RoundedLowering(graph, assignment, forward.part.ranges, form).run()
    for path, layer in list(lowered.named_modules()):
        if isinstance(layer, ConvLayer):
            owner, _, leaf = path.rpartition(".")
            setattr(lowered.get_submodule(owner), leaf, PlainConv(layer))
    return lowered
