"""A network as a graph of deployed layers: traced, norms folded, activations and sums fused."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torchvision.ops import FrozenBatchNorm2d

from legocompress.deploy.plain_site import LinearSite, MeanSite, PlainSite, PoolSite
from legocompress.deploy.site import Activation, ConvSite, is_foldable, is_hooked, is_site
from legocompress.errors import DeployError

LEAVES = (_ConvNd, nn.Linear, _BatchNorm, FrozenBatchNorm2d)
PASS_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout2d)
SUMS = (operator.add, operator.iadd, torch.add)
ACTIVATIONS: dict[Any, Activation] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu",
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu",
}  # fmt: skip


@dataclass
class Graph:
    """A traced part of a network with its deployed layers, and what was folded into them."""

    name: str
    root: nn.Module
    runner: fx.GraphModule
    convs: list[ConvSite] = field(default_factory=list)
    plains: list[PlainSite] = field(default_factory=list)
    layers: set[nn.Module] = field(default_factory=set)
    n_norms: int = 0
    n_activations: int = 0
    n_sums: int = 0

    def opaque(self) -> Iterator[nn.Module]:
        """The modules that the graph still calls as they are."""
        for node in self.runner.graph.nodes:
            if node.op == "call_module" and not str(node.target).startswith("sites."):
                yield self.runner.get_submodule(str(node.target))


class _One(nn.Module):
    """Calls a network of one input, so that the network itself can be a leaf of the trace."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor) -> Any:
        return self.net(a)


class _Two(_One):
    def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
        return self.net(a, b)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (*LEAVES, *get_notrace_modules())

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, self._leaves) or super().is_leaf_module(module, name):
            return True
        return name != "net" and is_hooked(module)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Whoever listens to the network itself is called outside of its forward.
        return super().call_module(m, m.forward if m is self.root.net else forward, args, kwargs)


def trace(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Graph:
    """Trace a network in eval mode and turn its convs into deployed layers.

    The network itself is not changed: its layers' values are copied where something is folded in.

    Args:
        name: the network's own name, before those of its layers; '' for a root.
        module: the network.
        inputs: one or two tensors (N, c, H, W) to learn the sizes of its maps from.

    Raises:
        DeployError: it takes other inputs than that, or changes its own state.
        Exception: whatever the network's own code raises when it is traced.
    """
    if len(inputs) not in (1, 2):
        raise DeployError(f"only networks of one or two inputs are traced, not {len(inputs)}")
    if isinstance(module, tuple(get_notrace_modules())):
        raise DeployError(f"timm says that {type(module).__name__} cannot be traced")
    entry = _One(module) if len(inputs) == 1 else _Two(module)
    before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    graph = _Tracer().trace(entry)
    changed = [(buffer, value) for buffer, count, value in before if buffer._version != count]
    for buffer, value in changed:
        buffer.copy_(value)
    if changed:
        raise DeployError("its forward pass changes its buffers")
    runner = fx.GraphModule(entry, graph)
    with torch.no_grad():
        _Shapes(runner).run(*inputs)
    found = Graph(name, module, runner)
    runner.add_submodule("sites", nn.ModuleList())
    _skip_pass_through_(runner)
    made: dict[Any, ConvSite] = {}
    for node in list(graph.nodes):
        if node.op == "call_module":
            layer = runner.get_submodule(str(node.target))
            if is_site(layer, heard=layer is module) and _is_map(node.args):
                _fuse_conv_(found, node, layer, made)
            elif (site := _plain_site(found, node, layer)) is not None:
                found.plains.append(site)
                pattern = [node]
                if isinstance(site, LinearSite):
                    _fuse_activation_(found, site, pattern)
                _replace_(found, pattern, site, (node.args[0],), node)
    _spare_residuals_(found)
    graph.lint()
    runner.recompile()
    return found


def _plain_site(graph: Graph, node: fx.Node, layer: nn.Module) -> PlainSite | None:
    """The site of a layer that is no conv and has a route of ours."""
    if is_hooked(layer) or len(node.args) != 1 or node.kwargs:
        return None
    name = _own_name(graph, node)
    if type(layer) is nn.MaxPool2d and not layer.return_indices:
        return PoolSite(name, layer)
    if type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)):
        return MeanSite(name) if _is_map(node.args) else None
    if type(layer) is nn.Linear:
        shape = node.args[0].meta["shape"] if isinstance(node.args[0], fx.Node) else None
        return LinearSite(name, layer) if len(shape or ()) == 2 else None
    return None


def _fuse_activation_(graph: Graph, site: LinearSite, pattern: list[fx.Node]) -> None:
    """Let a linear layer do the activation that follows it."""
    following = _only_user(pattern[0])
    site.activation = _activation(graph, following)
    if following is not None and site.activation != "none":
        pattern.append(following)
        graph.n_activations += 1


def _spare_residuals_(graph: Graph) -> None:
    """Tell each layer that reads its residual last that it may write its output there.

    Only where a deployed layer made the residual and deployed layers alone read it: their outputs
    share no memory with their inputs.
    """
    nodes = list(graph.runner.graph.nodes)
    order = {node: place for place, node in enumerate(nodes)}

    def deployed(node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target).startswith("sites.")

    for node in nodes:
        if not deployed(node) or len(node.args) != 2:
            continue
        x, residual = node.args
        if x is residual or not deployed(residual) or not all(map(deployed, residual.users)):
            continue
        if max(order[user] for user in residual.users) == order[node]:
            node.args = (x, residual, True)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor in it."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        node.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
        node.meta["dtype"] = result.dtype if isinstance(result, Tensor) else None
        return result


def _is_map(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and isinstance(args[0], fx.Node) and len(args[0].meta["shape"] or ()) == 4


def _own_name(graph: Graph, node: fx.Node) -> str:
    name = str(node.target).removeprefix("net").removeprefix(".")
    return ".".join(part for part in (graph.name, name) if part)


def _skip_pass_through_(runner: fx.GraphModule) -> None:
    """Take out the modules that hand on their input in eval mode, so that patterns can be seen."""
    for node in list(runner.graph.nodes):
        if node.op == "call_module":
            layer = runner.get_submodule(str(node.target))
            if type(layer) in PASS_THROUGH and not layer.training and not is_hooked(layer):
                node.replace_all_uses_with(node.args[0])
                runner.graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(graph: Graph, node: fx.Node | None) -> nn.Module | None:
    if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    layer = graph.runner.get_submodule(str(node.target))
    return None if is_hooked(layer) else layer


def _fuse_conv_(graph: Graph, conv: fx.Node, layer: Any, made: dict[Any, ConvSite]) -> None:
    """Replace a conv, and what follows it alone, by one deployed layer."""
    pattern = [conv]
    norm = _module(graph, _only_user(conv))
    activation: Activation = "none"
    own_activation: Any = None
    residual: fx.Node | None = None
    total: fx.Node | None = None
    if norm is not None and is_foldable(norm):
        pattern.append(next(iter(conv.users)))
        own_activation = getattr(norm, "act", None)
        if type(own_activation) is nn.Identity:
            own_activation = None
    else:
        norm = None
    if own_activation is not None:
        activation = ACTIVATIONS.get(type(own_activation), "none")
    else:
        following = _only_user(pattern[-1])
        residual = _residual(graph, pattern, following)
        if residual is not None:
            assert following is not None
            total = following
            pattern.append(total)
        following = _only_user(pattern[-1])
        activation = _activation(graph, following)
        if activation != "none":
            assert following is not None
            pattern.append(following)
    key = (layer, norm, activation, residual is not None)
    if key not in made:
        name = _own_name(graph, conv)
        again = sum(site.name.partition("#")[0] == name for site in made.values())
        made[key] = ConvSite(f"{name}#{again + 1}" if again else name, layer, norm, activation)
        graph.convs.append(made[key])
        graph.layers.add(layer)
    graph.n_norms += norm is not None
    graph.n_activations += activation != "none"
    graph.n_sums += residual is not None
    args = (conv.args[0],) if residual is None else (conv.args[0], residual)
    # A sum is made where it stood, when both of its parts are there.
    place = conv if total is None else total
    fused = _replace_(graph, pattern, made[key], args, place)
    if own_activation is not None and activation == "none":
        assert norm is not None
        target = f"{pattern[1].target}.act"
        graph.runner.add_submodule(target, own_activation)
        with graph.runner.graph.inserting_after(fused):
            after = graph.runner.graph.call_module(target, (fused,))
        after.meta.update(fused.meta)
        fused.replace_all_uses_with(after, lambda user: user is not after)


def _residual(graph: Graph, pattern: list[fx.Node], total: fx.Node | None) -> fx.Node | None:
    """The other part of a sum of two maps of one size, if it may be taken into the conv."""
    if total is None or total.kwargs or len(total.args) != 2:
        return None
    method = total.op == "call_method" and total.target in ("add", "add_")
    if not method and not (total.op == "call_function" and total.target in SUMS):
        return None
    ours, other = total.args
    if other is pattern[-1]:
        if total.target in (operator.iadd, "add_"):
            return None  # it changes the other part, which somebody may still read
        ours, other = other, ours
    if not isinstance(other, fx.Node) or ours is other:
        return None
    shape = pattern[0].meta["shape"]
    same = other.meta["shape"] == shape and other.meta["dtype"] == pattern[0].meta["dtype"]
    if not same or shape[2] * shape[3] == 1:  # 1 x 1 maps may be ones that are broadcast
        return None
    node = pattern[0].next
    while node is not total:
        if node not in pattern and _may_write(graph, node):
            return None  # the conv's input may be another by the time of the sum
        node = node.next
    return other


def _may_write(graph: Graph, node: fx.Node) -> bool:
    """Whether a node could change a tensor that another node made."""
    if node.op == "call_module":
        layer = graph.runner.get_submodule(str(node.target))
        if isinstance(layer, (*LEAVES, ConvSite, PlainSite)):
            return is_hooked(layer)
        plain = type(layer).__module__.startswith("torch.nn.") and not is_hooked(layer)
        return bool(getattr(layer, "inplace", not plain))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "_")
        written = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv", "setitem")
        flags = (*node.args[1:], *node.kwargs.values())
        return written or "out" in node.kwargs or any(flag is True for flag in flags)
    return False


def _activation(graph: Graph, node: fx.Node | None) -> Activation:
    if node is None:
        return "none"
    if node.op == "call_module":
        layer = _module(graph, node)
        return ACTIVATIONS.get(type(layer), "none") if layer is not None else "none"
    if node.op in ("call_function", "call_method") and len(node.args) == 1:
        return ACTIVATIONS.get(node.target, "none") if set(node.kwargs) <= {"inplace"} else "none"
    return "none"


def _replace_(
    graph: Graph, pattern: list[fx.Node], site: nn.Module, args: tuple[Any, ...], place: fx.Node
) -> fx.Node:
    """Put a deployed layer at `place` for the nodes of a pattern, whose last one it stands for."""
    sites: Any = graph.runner.sites
    number = next((i for i, known in enumerate(sites) if known is site), len(sites))
    if number == len(sites):
        sites.append(site)
    with graph.runner.graph.inserting_before(place):
        node = graph.runner.graph.call_module(f"sites.{number}", args)
    node.meta.update(pattern[-1].meta)
    pattern[-1].replace_all_uses_with(node)
    for old in reversed(pattern):
        graph.runner.graph.erase_node(old)
    return node
