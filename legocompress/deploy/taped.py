"""Runs of neighbouring layers on the kernels' routes, each as one call of the library."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from legocompress import kernels
from legocompress.deploy.plain_site import PlainSite
from legocompress.deploy.site import ConvSite
from legocompress.errors import KernelError

MOST_TAPES = 4  # of different sizes of the inputs; each has an arena
FLATTEN = (torch.flatten, "flatten")


class Taped(nn.Module):
    """A run of layers: recorded on the first inputs of a size, and replayed on the next ones."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body
        self._tapes: dict[Any, kernels.Tape | None] = {}

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The run's outputs, as its body makes them."""
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
        except KeyError:  # also where another thread has just let it go
            return self._first(key, inputs)
        return self.body(*inputs) if tape is None else tape(*inputs)  # type: ignore[no-any-return]

    def _first(self, key: Any, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with kernels.recording(inputs) as recorder:
            outputs: Sequence[Tensor] = self.body(*inputs)
        for oldest in list(self._tapes)[: 1 - MOST_TAPES]:
            self._tapes.pop(oldest, None)
        try:
            self._tapes[key] = kernels.Tape(recorder, outputs)
        except KernelError:
            self._tapes[key] = None  # the body goes on
        return outputs


def taped(runner: fx.GraphModule) -> fx.GraphModule:
    """A graph with each run of two or more layers on the kernels' routes as one module.

    The graph itself stays as it is, and shares its layers with the new one.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(runner.graph, {}))
    result = fx.GraphModule(runner, graph)
    runs = [run for run in _runs(result) if sum(n.op == "call_module" for n in run) > 1]
    for number, run in enumerate(runs):
        _cut_(result, run, f"runs.{number}")
    return result


def _runs(runner: fx.GraphModule) -> Iterator[list[fx.Node]]:
    run: list[fx.Node] = []
    for node in runner.graph.nodes:
        if _on_tape(runner, node):
            run.append(node)
        elif run:
            yield run
            run = []


def _on_tape(runner: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a kernel on its inputs as they are, or looks at its output in a row."""
    if node.op in ("call_function", "call_method") and node.target in FLATTEN:
        return node.args[1:] == (1,) and not node.kwargs
    if node.op != "call_module":
        return False
    layer = runner.get_submodule(str(node.target))
    if isinstance(layer, ConvSite):
        padded = layer.geometry.same or any(layer.geometry.pad)
        # PyTorch adds the residual of a depthwise conv, and no recording sees that.
        summed = layer.is_depthwise and len(node.args) > 1
        return layer.route in ("fused", "winograd") and not padded and not summed
    if isinstance(layer, PlainSite):
        return layer.route == "kernel"
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def _cut_(runner: fx.GraphModule, run: list[fx.Node], name: str) -> None:
    """Put one module in the place of a run of nodes."""
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = list(dict.fromkeys(x for node in run for x in node.all_input_nodes if x not in run))
    for x in inputs:
        copies[x] = body.placeholder(x.name)
    for node in run:
        copies[node] = body.node_copy(node, copies.__getitem__)
    outputs = [node for node in run if any(user not in run for user in node.users)]
    body.output(tuple(copies[node] for node in outputs))
    runner.add_submodule(name, Taped(fx.GraphModule(runner, body)))
    with runner.graph.inserting_after(run[-1]):
        call = runner.graph.call_module(name, tuple(inputs))
    after = call
    for i, node in enumerate(outputs):
        with runner.graph.inserting_after(after):
            after = runner.graph.call_function(operator.getitem, (call, i))
        node.replace_all_uses_with(after, lambda user: user not in run and user is not call)
    for node in reversed(run):
        runner.graph.erase_node(node)
    runner.recompile()
