"""Which nodes of a traced network have an integer form: each becomes a layer of `layers`."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from legocompress.deploy.conv_layer import DeployedConv
from legocompress.deploy.folding import is_foldable
from legocompress.deploy.fusing import FusedGraph, fuse_graph
from legocompress.deploy.geometry import Geometry
from legocompress.deploy.hooks import is_hooked
from legocompress.deploy.patterns import SUMS
from legocompress.deploy.plain_layers import DeployedLinear, DeployedMean, DeployedPool
from legocompress.deploy.tracing import only_user, qualified_name
from legocompress.lego.module import LegoModule
from legocompress.quantize.activations import find_pointwise
from legocompress.quantize.layers import (
    AddLayer,
    CatLayer,
    ClampedLayer,
    ConvLayer,
    FloatLayer,
    GateLayer,
    LinearLayer,
    MeanLayer,
    PointwiseLayer,
    PoolLayer,
    deployed_conv_layer,
)
from legocompress.quantize.sources import read_average, read_norm

# What only moves values, and so acts on uint8 maps as on others.
MOVES: tuple[Any, ...] = (
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split,
    torch.squeeze, torch.unsqueeze, operator.getitem, F.pixel_shuffle, F.channel_shuffle,
)  # fmt: skip
MOVING_METHODS = (
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "chunk", "split",
    "squeeze", "unsqueeze", "clone",
)  # fmt: skip
MOVING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Flatten, nn.ChannelShuffle, nn.PixelShuffle, nn.UpsamplingNearest2d, nn.Identity,
)  # fmt: skip
PRODUCTS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul)


class IntegerGraph:
    """A traced network in which `FloatLayer`s stand for all that has an integer form.

    Attributes:
        name: the module's name in the network; '' for the root.
        root: the module, unchanged.
        graph_module: what computes as the module does, but with weights rounded to int8.
    """

    def __init__(self, fused: FusedGraph) -> None:
        self.name, self.root = fused.name, fused.root
        self.graph_module = fused.graph_module
        self.undeployed = list(fused.undeployed_modules())
        _Rewriter(self.graph_module, self.name, self.root).run()

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes, in order."""
        return list(self.graph_module.graph.nodes)

    def layer(self, node: fx.Node) -> FloatLayer | None:
        """The layer that a node calls; None for other nodes."""
        if node.op != "call_module":
            return None
        layer = self.graph_module.get_submodule(str(node.target))
        return layer if isinstance(layer, FloatLayer) else None

    def layers(self) -> Iterator[tuple[fx.Node, FloatLayer]]:
        """The nodes that call a layer, with it."""
        for node in self.nodes:
            layer = self.layer(node)
            if layer is not None:
                yield node, layer

    def live_modules(self) -> set[nn.Module]:
        """The modules that the graph calls as they are, with their parts."""
        return {
            part
            for node in self.nodes
            if node.op == "call_module" and self.layer(node) is None
            for part in self.graph_module.get_submodule(str(node.target)).modules()
        }


def trace_integer_graph(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> IntegerGraph:
    """Trace a module in eval mode; it is not changed.

    Raises:
        DeployError: it cannot be traced, see `deploy.fusing.fuse_graph`.
        Exception: whatever the module's own code raises when it is traced.
    """
    return IntegerGraph(fuse_graph(name, module, inputs))


class _Rewriter:
    """Puts the layers into the graph, then fuses activations into the layers before them."""

    def __init__(self, graph_module: fx.GraphModule, prefix: str, root: nn.Module) -> None:
        self.graph_module, self.prefix, self.root = graph_module, prefix, root
        self.graph = graph_module.graph
        self.names: dict[str, int] = {}
        self.container = nn.ModuleList()
        self.graph_module.add_submodule("quantizable", self.container)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            layer = self._layer(node)
            if layer is not None:
                self._replace(node, layer)
        for node in list(self.graph.nodes):
            self._fuse_activation(node)
        self.graph.lint()
        self.graph_module.recompile()

    def _unique(self, name: str) -> str:
        self.names[name] = self.names.get(name, 0) + 1
        return name if self.names[name] == 1 else f"{name}@{self.names[name]}"

    def _replace(self, node: fx.Node, layer: FloatLayer) -> None:
        self.container.append(layer)
        maps: Any = node.args[0] if isinstance(layer, CatLayer) else node.args
        args = tuple(a for a in maps if isinstance(a, fx.Node))
        if isinstance(layer, (ConvLayer, AddLayer)):
            args = args[:2]
        elif not isinstance(layer, (CatLayer, GateLayer)):
            args = args[:1]
        if isinstance(layer, GateLayer) and _size(args[0])[2:] == (1, 1):
            args = (args[1], args[0])
        with self.graph.inserting_before(node):
            call = self.graph.call_module(f"quantizable.{len(self.container) - 1}", args)
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)

    def _layer(self, node: fx.Node) -> FloatLayer | None:
        if node.op == "call_module":
            return self._of_module(node, self.graph_module.get_submodule(str(node.target)))
        if node.op not in ("call_function", "call_method") or node.meta.get("dtype") is None:
            return None
        return self._of_function(node)

    def _of_module(self, node: fx.Node, layer: Any) -> FloatLayer | None:
        if isinstance(layer, DeployedConv):
            return deployed_conv_layer(self._unique(layer.name), layer.folded)
        if isinstance(layer, DeployedPool):
            return PoolLayer(self._unique(layer.name), (*layer.geometry, layer.ceil_mode))
        if isinstance(layer, DeployedMean):
            return MeanLayer(self._unique(layer.name), True)
        if isinstance(layer, DeployedLinear):
            source = self.root.get_submodule(layer.name[len(self.prefix) :].lstrip("."))
            if isinstance(source, LegoModule) or not isinstance(source, nn.Linear):
                return None
            return LinearLayer(self._unique(layer.name), source, layer.activation)
        if is_hooked(layer) or not _reads_one_map(node):
            return None
        name = qualified_name(self.prefix, node)
        if is_foldable(layer) and type(getattr(layer, "act", nn.Identity())) is nn.Identity:
            return ConvLayer(self._unique(name), read_norm(layer))
        if type(layer) is nn.AvgPool2d:
            geometry = _average_geometry(node, layer)
            channels = _size(node.args[0])[1]
            return (
                None
                if geometry is None
                else ConvLayer(self._unique(name), read_average(channels, geometry))
            )
        return self._pointwise(node, name)

    def _of_function(self, node: fx.Node) -> FloatLayer | None:
        target, name = node.target, node.name
        if self.prefix:
            name = f"{self.prefix}:{name}"
        if node.op == "call_function" and target is torch.cat:
            axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            return (
                CatLayer(self._unique(name), axis)
                if isinstance(node.args[0], (list, tuple))
                and type(axis) is int
                and all(map(_is_float, node.args[0]))
                else None
            )
        if _is_mean(node):
            return MeanLayer(self._unique(name), len(_size(node)) == 4)
        if target in (*SUMS, "add", "add_", *PRODUCTS, "mul", "mul_"):
            if len(node.args) != 2 or node.kwargs or not all(map(_is_map, node.args)):
                return None
            sizes = [_size(arg) for arg in node.args]
            if target in (*SUMS, "add", "add_"):
                # A 1 x 1 map may be broadcast at other sizes.
                same = sizes[0] == sizes[1] and sizes[0][2:] != (1, 1)
                return AddLayer(self._unique(name)) if same else None
            small = [size[2:] == (1, 1) for size in sizes]
            fits = sizes[0][:2] == sizes[1][:2] and small[0] != small[1]
            return GateLayer(self._unique(name)) if fits else None
        return self._pointwise(node, name)

    def _pointwise(self, node: fx.Node, name: str) -> FloatLayer | None:
        if not node.args or not _is_float(node.args[0]):
            return None
        found = find_pointwise(self.graph_module, node)
        return None if found is None else PointwiseLayer(self._unique(name), *found)

    def _fuse_activation(self, node: fx.Node) -> None:
        """Let the layer before an activation apply it, if nobody else reads that layer."""
        if node.op != "call_module":
            return
        activation: Any = self.graph_module.get_submodule(str(node.target))
        if not isinstance(activation, PointwiseLayer):
            return
        before: Any = node.args[0]
        if only_user(before) is not node or before.op != "call_module":
            return
        layer: Any = self.graph_module.get_submodule(str(before.target))
        if not isinstance(layer, ClampedLayer) or not layer.is_plain:
            return
        if activation.kind != "table":
            layer.clamp = activation.kind
        elif isinstance(layer, ConvLayer):
            layer.pointwise = activation.pointwise
        else:
            return
        node.replace_all_uses_with(before)
        self.graph.erase_node(node)


def is_move(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only moves the values of one tensor."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_function":
        return node.target in MOVES or _is_nearest(node)
    if node.op == "call_method":
        return node.target in MOVING_METHODS
    if node.op == "call_module":
        layer = graph_module.get_submodule(str(node.target))
        is_nearest = type(layer) is nn.Upsample and layer.mode == "nearest"
        return (type(layer) in MOVING_MODULES or is_nearest) and not is_hooked(layer)
    return False


def is_size(node: fx.Node) -> bool:
    """Whether a node reads only the sizes of its tensor."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("shape", "ndim")


def _is_nearest(node: fx.Node) -> bool:
    mode = node.args[3] if len(node.args) > 3 else node.kwargs.get("mode", "nearest")
    return bool(node.target is F.interpolate and mode == "nearest")


def _is_mean(node: fx.Node) -> bool:
    """Whether a node averages each map of (N, c, H, W)."""
    if not node.args or not _is_map(node.args[0]):
        return False
    if node.target is F.adaptive_avg_pool2d:
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return size in (1, (1, 1), [1, 1])
    if node.target not in (torch.mean, "mean"):
        return False
    axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(axes, (list, tuple)) or set(node.kwargs) - {"dim", "keepdim"}:
        return False
    return bool(sorted(axis % 4 for axis in axes if type(axis) is int) == [2, 3])


def _average_geometry(node: fx.Node, layer: nn.AvgPool2d) -> Geometry | None:
    """The geometry of average pooling that every output pixel applies alike; None for other."""
    kernel, stride, padding = (
        (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    differs_at_border = (any(padding) and not layer.count_include_pad) or layer.divisor_override
    if differs_at_border or layer.ceil_mode:
        return None
    return Geometry(kernel, stride, padding, (1, 1), _size(node.args[0])[1])


def _is_float(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.meta.get("dtype") == torch.float32


def _is_map(value: Any) -> bool:
    return _is_float(value) and len(_size(value)) == 4


def _reads_one_map(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs and _is_map(node.args[0])


def _size(value: Any) -> tuple[int, ...]:
    return tuple(value.meta["shape"])
