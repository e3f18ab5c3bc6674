"""The operators of a quantised network on the int8 kernels, with the bits of the emulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from legocompress import kernels
from legocompress.errors import KernelError
from legocompress.kernels import IntegerMap
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
    pad_map,
)

Padding = tuple[int, int, int, int]


class CompiledOperator(nn.Module):
    """An operator by a kernel; `border` is that of its output."""

    def __init__(self, operator: Any, border: int) -> None:
        super().__init__()
        self.operator, self.border = operator, border
        self.name = operator.name


class CompiledQuantize(CompiledOperator):
    """float32 (N, c, H, W) to a map."""

    def forward(self, x: Tensor) -> IntegerMap:
        """Round a map."""
        out = self.operator.out
        return kernels.quantize_int8(x.contiguous(), out.scale, out.zero, self.border)


class CompiledDequantize(CompiledOperator):
    """A map to float32."""

    def forward(self, x: IntegerMap) -> Tensor:
        """The values that a map stands for."""
        return kernels.dequantize_int8(x, self.operator.x.scale)


class CompiledConv(CompiledOperator):
    """A conv; it is packed for each padding that it meets."""

    def __init__(self, operator: IntegerConvLayer, border: int) -> None:
        super().__init__(operator, border)
        self._packed: dict[Padding, kernels.PackedIntegerConv] = {}

    def forward(self, x: IntegerMap, residual: IntegerMap | None = None) -> IntegerMap:
        """Run the conv."""
        geometry = self.operator.geometry
        _, padding = pad_map(geometry, torch.empty(x.shape, device="meta"))
        packed = self._packed.get(padding)
        if packed is None:
            packed = kernels.pack_integer_conv(
                self.operator.conv, geometry.stride, padding, geometry.dilation
            )
            self._packed[padding] = packed
        return kernels.convolve_int8(x, packed, residual, self.border, self.operator.out_zero)


class CompiledLinear(CompiledOperator):
    """A linear layer without an activation, from a map (N, c, 1, 1) to float32 (N, n)."""

    def __init__(self, operator: IntegerLinearLayer, border: int) -> None:
        super().__init__(operator, border)
        self.packed = kernels.pack_integer_linear(operator.linear)

    def forward(self, x: IntegerMap) -> Tensor:
        """Multiply."""
        return kernels.apply_linear_int8(x, self.packed)


class CompiledPool(CompiledOperator):
    """Max pooling."""

    def forward(self, x: IntegerMap) -> IntegerMap:
        """Pool."""
        kernel, stride, padding, dilation = self.operator.arguments[:4]
        return kernels.max_pool_int8(x, kernel, stride, padding, dilation, self.border)


class CompiledMean(CompiledOperator):
    """The mean of each map, a map (N, c, 1, 1)."""

    def forward(self, x: IntegerMap) -> IntegerMap:
        """Average."""
        multiplier = self.operator.multiplier(torch.empty(x.shape, device="meta"))
        return kernels.average_maps_int8(x, multiplier, self.operator.out.zero)


class CompiledAdd(CompiledOperator):
    """The sum of two maps."""

    def forward(self, a: IntegerMap, b: IntegerMap) -> IntegerMap:
        """Add."""
        o = self.operator
        return kernels.add_maps_int8(
            a, b, o.multipliers, o.bias, o.out_shift, o.out_zero, *o.bounds
        )


class CompiledGate(CompiledOperator):
    """Maps times their gates."""

    def forward(self, x: IntegerMap, gate: IntegerMap) -> IntegerMap:
        """Multiply."""
        o = self.operator
        return kernels.scale_maps_int8(x, gate, o.multiplier, o.bias, o.out_shift, o.out_zero)


class CompiledTable(CompiledOperator):
    """An activation by itself."""

    def forward(self, x: IntegerMap) -> IntegerMap:
        """Look up."""
        return kernels.look_up_int8(x, self.operator.table, self.operator.out_zero)


class CompiledCat(CompiledOperator):
    """Maps side by side."""

    def forward(self, *maps: IntegerMap) -> IntegerMap:
        """Join."""
        return kernels.concatenate_int8(maps)


class FlattenOnePixel(nn.Module):
    """Leaves a map (N, c, 1, 1) as it is, since a linear layer reads it so."""

    def forward(self, x: IntegerMap) -> IntegerMap:
        """Return the map."""
        if x.shape[2:] != (1, 1):
            raise KernelError(f"a map of {x.shape} has more than one pixel")
        return x


class LayOutMap(nn.Module):
    """uint8 (N, c, H, W) or (N, c) to a map."""

    def __init__(self, border: int, zero: int) -> None:
        super().__init__()
        self.border, self.zero = border, zero

    def forward(self, x: Tensor) -> IntegerMap:
        """Lay out a map."""
        return kernels.lay_out_map(
            x[:, :, None, None] if x.dim() == 2 else x, self.border, self.zero
        )


class ReadMap(nn.Module):
    """A map to uint8 (N, c, H, W)."""

    def forward(self, x: IntegerMap) -> Tensor:
        """Read a map."""
        return kernels.read_map(x)


FORMS: dict[type[IntegerOperator], type[CompiledOperator]] = {
    QuantizeMap: CompiledQuantize, DequantizeMap: CompiledDequantize,
    IntegerConvLayer: CompiledConv, IntegerLinearLayer: CompiledLinear, IntegerPool: CompiledPool,
    IntegerMean: CompiledMean, IntegerAdd: CompiledAdd, IntegerGate: CompiledGate,
    IntegerTable: CompiledTable, IntegerCat: CompiledCat,
}  # fmt: skip
TO_FLOAT = (CompiledDequantize, CompiledLinear)
KEEPS_BORDER = (IntegerAdd, IntegerCat, IntegerTable)  # all their maps have one border
COMPILED = (CompiledOperator, FlattenOnePixel)


class _Compiler:
    """Copies a graph of integer operators; each value exists as a map, as a tensor, or as both."""

    def __init__(self, source: fx.GraphModule) -> None:
        self.source = source
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.maps: dict[fx.Node, fx.Node] = {}
        self.tensors: dict[fx.Node, fx.Node] = {}
        self.zeros: dict[fx.Node, int] = {}
        self.compiled = {n for n in source.graph.nodes if self._is_compiled(n)}
        self.flattened = {n for n in source.graph.nodes if self._is_flatten_for_linear(n)}
        self.borders = self._plan_borders()

    def run(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            if node in self.compiled:
                self._compile(node)
            elif node in self.flattened:
                self.maps[node] = self._call(FlattenOnePixel(), (self.maps[node.args[0]],))
            else:
                self.tensors[node] = self.graph.node_copy(node, self._as_tensor)
                self.zeros[node] = self._zero(node)
        named = dict(self.source.named_modules())
        attributes: dict[str, Any] = dict(self.modules)
        for node in self.graph.nodes:
            if node.op == "call_module" and str(node.target) not in attributes:
                attributes[str(node.target)] = named[str(node.target)]
            if node.op == "get_attr":
                attributes[str(node.target)] = _fetch(self.source, str(node.target))
        self.graph.lint()
        return fx.GraphModule(attributes, self.graph)

    def _operator(self, node: fx.Node) -> IntegerOperator | None:
        if node.op != "call_module":
            return None
        module = self.source.get_submodule(str(node.target))
        return module if isinstance(module, IntegerOperator) else None

    def _is_compiled(self, node: fx.Node) -> bool:
        operator = self._operator(node)
        n_axes = len(node.meta.get("shape") or (0, 0, 0, 0))
        if operator is None:
            return False
        if isinstance(operator, IntegerLinearLayer):
            return operator.activation == "none"
        if isinstance(operator, IntegerPool):
            return not operator.arguments[4]
        if isinstance(operator, IntegerConvLayer):
            return not any(operator.geometry.pad) or operator.geometry.mode == "constant"
        if isinstance(operator, IntegerMean):
            return operator.keeps_axes or self._only_linears_read(node)
        if isinstance(operator, IntegerCat):
            return operator.axis % 4 == 1 and n_axes == 4
        if isinstance(operator, (QuantizeMap, DequantizeMap)):
            return bool(node.meta.get("n_axes") == 4)
        return n_axes == 4

    def _only_linears_read(self, node: fx.Node) -> bool:
        return all(isinstance(self._operator(user), IntegerLinearLayer) for user in node.users)

    def _is_flatten_for_linear(self, node: fx.Node) -> bool:
        """Whether a node flattens a map of one pixel for linear layers alone."""
        x = node.args[0] if node.args else None
        if x not in self.compiled or self._operator(node) is not None:
            return False
        size = node.meta.get("shape")
        before = x.meta.get("shape")  # type: ignore[union-attr]
        if size is None or before is None or len(size) != 2 or tuple(before[2:]) != (1, 1):
            return False
        return tuple(size) == tuple(before[:2]) and self._only_linears_read(node)

    def _plan_borders(self) -> dict[fx.Node, int]:
        """The border of each map: wide enough for its readers, and alike where it must be."""
        parent: dict[fx.Node, fx.Node] = {}

        def find(node: fx.Node) -> fx.Node:
            while parent.setdefault(node, node) is not node:
                node = parent[node]
            return node

        needed: dict[fx.Node, int] = {}
        for node in self.source.graph.nodes:
            operator = self._operator(node)
            if node not in self.compiled or operator is None:
                continue
            inputs = node.all_input_nodes
            alike: list[fx.Node] = []
            if isinstance(operator, KEEPS_BORDER):
                alike = inputs
            elif isinstance(operator, IntegerGate):
                alike = inputs[:1]
            elif isinstance(operator, IntegerConvLayer):
                alike = inputs[1:]
                x = inputs[0]
                needed[x] = max(needed.get(x, 0), _reach(operator))
                if x.meta.get("shape", (0, 0))[2:] == node.meta.get("shape", (0, 0))[2:]:
                    alike = inputs  # a stride of 1 on equal borders is one run over all pixels
            elif isinstance(operator, IntegerPool):
                padding = operator.arguments[2]
                needed[inputs[0]] = max(needed.get(inputs[0], 0), *padding)
            for x in alike:
                parent[find(x)] = find(node)
        groups: dict[fx.Node, int] = {}
        for node, border in needed.items():
            groups[find(node)] = max(groups.get(find(node), 0), border)
        return {node: groups.get(find(node), 0) for node in self.source.graph.nodes}

    def _zero(self, node: fx.Node) -> int:
        """The zero point of a uint8 tensor that is not compiled."""
        operator = self._operator(node)
        if operator is not None:
            return operator.out_zero
        x = next(iter(node.args), None)
        return self.zeros.get(x, 0) if isinstance(x, fx.Node) else 0

    def _call(self, module: nn.Module, args: tuple[fx.Node, ...]) -> fx.Node:
        name = f"compiled_{len(self.modules)}"
        self.modules[name] = module
        return self.graph.call_module(name, args)

    def _as_tensor(self, node: fx.Node) -> fx.Node:
        if node not in self.tensors:
            self.tensors[node] = self._call(ReadMap(), (self.maps[node],))
        return self.tensors[node]

    def _as_map(self, node: fx.Node) -> fx.Node:
        if node not in self.maps:
            layout = LayOutMap(self.borders[node], self.zeros[node])
            self.maps[node] = self._call(layout, (self.tensors[node],))
        return self.maps[node]

    def _compile(self, node: fx.Node) -> None:
        operator = self._operator(node)
        assert operator is not None
        form = FORMS[type(operator)](operator, self.borders[node])
        is_float = isinstance(operator, QuantizeMap)
        read = self._as_tensor if is_float else self._as_map
        args = tuple(read(x) for x in node.args)  # type: ignore[arg-type]
        call = self._call(form, args)
        self.zeros[node] = operator.out_zero
        (self.tensors if isinstance(form, TO_FLOAT) else self.maps)[node] = call


def _reach(operator: IntegerConvLayer) -> int:
    """The widest padding of a conv on maps of any size."""
    g = operator.geometry
    if g.same:
        return max((k - 1) * d // 2 for k, d in zip(g.kernel, g.dilation, strict=True))
    return max(*g.padding, *g.pad, 0)


def _fetch(module: Any, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module


def compile_graph(lowered: fx.GraphModule) -> fx.GraphModule:
    """The graph in which the kernels run every integer operator that they have.

    Raises:
        KernelError: a kernel refuses the numbers of a linear layer.
    """
    return _Compiler(lowered).run()


def is_compiled(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is one kernel call, or none."""
    if node.op != "call_module":
        return False
    return isinstance(graph_module.get_submodule(str(node.target)), COMPILED)


def returns_floats(graph_module: fx.GraphModule, run: list[fx.Node]) -> bool:
    """Whether all that others read of a run are float tensors, and all that it reads as well."""
    members = set(run)
    for node in run:
        module = graph_module.get_submodule(str(node.target))
        read_outside = any(user not in members for user in node.users)
        if read_outside and not isinstance(module, TO_FLOAT):
            return False
        reads_outside = any(x not in members for x in node.all_input_nodes)
        if reads_outside and not isinstance(module, CompiledQuantize):
            return False
    return True
