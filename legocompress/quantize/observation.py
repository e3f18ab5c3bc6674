"""Measuring, on images, what the ranges and shifts of a network are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from legocompress.errors import DataError
from legocompress.lego.surgery import Replacement
from legocompress.quantize.assignment import Assignment, assign_roles
from legocompress.quantize.builder import Sums
from legocompress.quantize.integer_graph import IntegerGraph
from legocompress.quantize.layers import ClampedLayer, ConvLayer
from legocompress.quantize.ranges import Values, join_values


@dataclass
class Observations:
    """What was seen in one graph, by name of the tensor and of the layer."""

    values: dict[str, Values] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    members: dict[str, set[str]] = field(default_factory=dict)  # names that share a range

    def joined(self, assignment: Assignment) -> dict[str, Values]:
        """The distributions of the ranges that an assignment needs, by name."""
        groups: dict[str, list[str]] = {}
        for node, name in assignment.names.items():
            if node.name in self.values:
                groups.setdefault(name, []).append(node.name)
        return {
            name: join_values([self.values[member] for member in groups[name]])
            if name in groups
            else self.values[name]
            for name in assignment.needed
        }


class Observer(fx.Interpreter):
    """Runs a graph in fp32 and records what its integer form needs.

    The first pass over the images records limits and sums, the second counts values in bins.
    """

    def __init__(self, graph: IntegerGraph) -> None:
        super().__init__(graph.graph_module)
        self.source = graph
        self.seen = Observations()
        self.counting = False
        self.assignment = assign_roles(graph)
        self.watched = {
            x for node in self.assignment.integer for x in (node, *node.all_input_nodes)
        }

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and record its output."""
        result = super().run_node(n)
        if n in self.watched and isinstance(result, Tensor) and result.is_floating_point():
            self._record(n.name, result)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer; record also what its table reads, and the sums of a conv."""
        layer = self.fetch_attr(target)
        if not isinstance(layer, ClampedLayer):
            return super().call_module(target, args, kwargs)
        if not isinstance(layer, ConvLayer):
            return layer(*args)
        y = layer.convolve(args[0]) if self.counting else self._measure_sums(layer, args[0])
        if len(args) > 1:
            y = y + args[1]
            if not self.counting:
                self.seen.sums[layer.name].extend(y)
        if layer.pointwise is not None:
            self._record(layer.pre_name, y)
        return layer.activate(y)

    def _measure_sums(self, layer: ConvLayer, x: Tensor) -> Tensor:
        if layer.name not in self.seen.sums:
            empty = torch.zeros(len(layer.source.filters), dtype=torch.float64)
            self.seen.sums[layer.name] = Sums(empty)
        sums = self.seen.sums[layer.name]
        z = layer.transform(x)
        sums.extend_filters(z)
        return layer.merge(z, sums.extend)

    def _record(self, name: str, x: Tensor) -> None:
        values = self.seen.values.setdefault(name, Values())
        if self.counting:
            values.count(x)
        elif x.numel():
            if not bool(x.isfinite().all()):
                raise DataError(
                    f"the map {name!r} has values that are not finite on these images, so it has "
                    "no range; check the weights of the network and the preprocessing of the images"
                )
            values.extend(x)


class ObservingForward(Replacement):
    """Runs an observer in the place of a module's forward."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the observer."""
        return self.observer.run(*inputs)


@contextmanager
def replaced_forwards(forwards: Sequence[tuple[nn.Module, Replacement]]) -> Iterator[None]:
    """Let modules run by other forwards for a while."""
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


def observe(
    model: nn.Module,
    graphs: Sequence[IntegerGraph],
    batches: Sequence[Tensor],
    report: Callable[[str, int, int], None],
) -> list[Observations]:
    """Run images through a network whose traced parts record their values; one result per part.

    Raises:
        DataError: a map holds values that are not finite.
    """
    observers = [Observer(graph) for graph in graphs]
    forwards = [(o.source.root, ObservingForward(o)) for o in observers]
    with torch.no_grad(), replaced_forwards(forwards):
        for counting in (False, True):
            for observer in observers:
                observer.counting = counting
            for number, images in enumerate(batches):
                model(images)
                done = number + 1 + counting * len(batches)
                report("measuring ranges", done, 2 * len(batches))
    return [observer.seen for observer in observers]
