"""Neighbouring layers on the kernels' routes, recorded once and replayed as one library call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from legocompress import kernels
from legocompress.deploy.conv_layer import DeployedConv
from legocompress.deploy.plain_layers import PlainLayer
from legocompress.errors import KernelError

MAX_TAPES = 4  # for different sizes of the inputs; each has its own memory
FLATTEN = (torch.flatten, "flatten")


class RecordedRun(nn.Module):
    """A run of layers: recorded on the first inputs of each size, and replayed on later ones."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body
        # By number of threads and sizes of the inputs; None where the body could not be recorded.
        self._tapes: dict[Any, kernels.Tape | None] = {}

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The run's outputs, as its body computes them."""
        if (
            torch.is_grad_enabled()
            or torch._C._len_torch_dispatch_stack()
            or any(type(x) is not Tensor for x in inputs)
        ):
            return self.body(*inputs)  # type: ignore[no-any-return]
        sizes = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        key = (torch.get_num_threads(), *sizes)
        try:
            tape = self._tapes[key]
        except KeyError:  # not recorded, or just dropped by another thread
            return self._record(key, inputs)
        return self.body(*inputs) if tape is None else tape(*inputs)  # type: ignore[no-any-return]

    def forget_tapes(self) -> None:
        """Drop the recordings, which hold the addresses of the layers' tensors."""
        self._tapes.clear()

    def _record(self, key: Any, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with kernels.recording(inputs) as recorder:
            outputs: Sequence[Tensor] = self.body(*inputs)
        for oldest in list(self._tapes)[: 1 - MAX_TAPES]:
            self._tapes.pop(oldest, None)
        try:
            self._tapes[key] = kernels.Tape(recorder, outputs)
        except KernelError:
            self._tapes[key] = None
        return outputs


def forget_tapes_(graph_module: nn.Module) -> None:
    """Let each `RecordedRun` of a graph record anew, since its layers' tensors may have moved."""
    for part in graph_module.modules():
        if isinstance(part, RecordedRun):
            part.forget_tapes()


def record_runs(
    graph_module: fx.GraphModule,
    is_recordable: Callable[[fx.GraphModule, fx.Node], bool] | None = None,
    is_run: Callable[[fx.GraphModule, list[fx.Node]], bool] | None = None,
) -> fx.GraphModule:
    """A copy of a graph in which each run of two or more kernel layers is one `RecordedRun`.

    The graph itself is not changed, and shares its layers with the copy.

    Args:
        graph_module: the graph.
        is_recordable: whether a node can be part of a run; by default, as deployed layers say.
        is_run: whether a run may be recorded; by default, all are.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    copied = fx.GraphModule(graph_module, graph)
    runs = [
        run
        for run in _runs(copied, is_recordable or _is_recordable)
        if sum(n.op == "call_module" for n in run) > 1 and (is_run is None or is_run(copied, run))
    ]
    for number, run in enumerate(runs):
        _replace_run_(copied, run, f"runs.{number}")
    return copied


def _runs(
    graph_module: fx.GraphModule, is_recordable: Callable[[fx.GraphModule, fx.Node], bool]
) -> Iterator[list[fx.Node]]:
    """The longest runs of neighbouring nodes that can be recorded."""
    run: list[fx.Node] = []
    for node in graph_module.graph.nodes:
        if is_recordable(graph_module, node):
            run.append(node)
        elif run:
            yield run
            run = []


def _is_recordable(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is one kernel call on its own inputs, or flattens (N, ...) to (N, -1)."""
    if node.op in ("call_function", "call_method") and node.target in FLATTEN:
        return node.args[1:] == (1,) and not node.kwargs
    if node.op != "call_module":
        return False
    layer = graph_module.get_submodule(str(node.target))
    if isinstance(layer, DeployedConv):
        return layer.is_kernel_call(adds_residual=len(node.args) > 1)
    if isinstance(layer, PlainLayer):
        return layer.route == "kernel"
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def _replace_run_(graph_module: fx.GraphModule, run: list[fx.Node], name: str) -> None:
    """Replace a run of nodes by one module that computes all outputs that others read."""
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = list(dict.fromkeys(x for node in run for x in node.all_input_nodes if x not in run))
    for x in inputs:
        copies[x] = body.placeholder(x.name)
    for node in run:
        copies[node] = body.node_copy(node, copies.__getitem__)
    outputs = [node for node in run if any(user not in run for user in node.users)]
    body.output(tuple(copies[node] for node in outputs))
    graph_module.add_submodule(name, RecordedRun(fx.GraphModule(graph_module, body)))
    with graph_module.graph.inserting_after(run[-1]):
        call = graph_module.graph.call_module(name, tuple(inputs))
    after = call
    for i, node in enumerate(outputs):
        with graph_module.graph.inserting_after(after):
            after = graph_module.graph.call_function(operator.getitem, (call, i))
        node.replace_all_uses_with(after, lambda user: user not in run and user is not call)
    for node in reversed(run):
        graph_module.graph.erase_node(node)
    graph_module.recompile()
