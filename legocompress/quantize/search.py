"""Choosing how ranges are made, and which layers stay in fp32, by the error of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from legocompress.lego.surgery import Replacement
from legocompress.models.outputs import find_logits, flatten_float_tensors
from legocompress.quantize import builder
from legocompress.quantize.assignment import assign_roles
from legocompress.quantize.forward import lower_part, set_exact_
from legocompress.quantize.integer_graph import IntegerGraph
from legocompress.quantize.layers import AddLayer, ConvLayer, GateLayer, LinearLayer
from legocompress.quantize.observation import Observations, replaced_forwards
from legocompress.quantize.ranges import choose_range
from legocompress.state.quantization import ConvShifts, MapRange, QuantizedPart

UNFIT = "its sums or multipliers do not fit 16 bits"
Excluded = dict[str, str]  # name of a layer -> reason


@dataclass
class ObservedPart:
    """A traced part, what was seen in it, and the shapes that it was traced with."""

    graph: IntegerGraph
    seen: Observations
    inputs: tuple[tuple[int, ...], ...]


def plan_part(part: ObservedPart, method: str, excluded: Excluded) -> QuantizedPart:
    """The ranges and shifts of a part by one method.

    Args:
        part: what was observed.
        method: one of `ranges.METHODS`.
        excluded: layers that stay in fp32; those that do not fit 16 bits are added.
    """
    while True:
        assignment = assign_roles(part.graph, excluded)
        distributions = part.seen.joined(assignment)
        ranges = {name: choose_range(v, method) for name, v in sorted(distributions.items())}
        shifts: dict[str, ConvShifts] = {}
        unfit = []
        for node, layer in part.graph.layers():
            if node not in assignment.integer:
                continue
            maps: list[MapRange] = [ranges[assignment.names[x]] for x in node.args]  # type: ignore[index]
            if isinstance(layer, ConvLayer):
                out = layer.pre_name if layer.pointwise is not None else assignment.names[node]
                residual = maps[1] if len(maps) > 1 else None
                chosen = builder.choose_shifts(
                    layer.source, part.seen.sums[layer.name], maps[0], ranges[out], residual
                )
                if chosen is None:
                    unfit.append(layer.name)
                else:
                    shifts[layer.name] = chosen
            elif isinstance(layer, AddLayer):
                y = ranges[assignment.names[node]]
                unfit += [] if builder.add_shift(*maps, y) is not None else [layer.name]
            elif isinstance(layer, GateLayer):
                y = ranges[assignment.names[node]]
                unfit += [] if builder.gate_shift(*maps, y) is not None else [layer.name]
        if not unfit:
            return QuantizedPart(inputs=part.inputs, ranges=ranges, shifts=shifts)
        excluded.update(dict.fromkeys(unfit, UNFIT))


class _Rounding(fx.Interpreter):
    """Runs a graph in fp32 and rounds every map that would be uint8 to its 256 values.

    This is within a rounding of 16-bit sums of the emulation, and several times as fast.
    """

    def __init__(self, part: ObservedPart, plan: QuantizedPart, excluded: Excluded) -> None:
        super().__init__(part.graph.graph_module)
        assignment = assign_roles(part.graph, excluded)
        self.ranges = plan.ranges
        self.names = {
            x: assignment.names[x]
            for node in assignment.integer
            for x in (node, *node.all_input_nodes)
            if assignment.names[x] in plan.ranges
        }
        for node, layer in part.graph.layers():
            if isinstance(layer, LinearLayer):
                self.names.pop(node, None)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and round its output."""
        result = super().run_node(n)
        if n in self.names and isinstance(result, Tensor):
            return _round_map(result, self.ranges[self.names[n]])
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer; round also what its table reads."""
        layer = self.fetch_attr(target)
        if isinstance(layer, ConvLayer) and layer.pre_name in self.ranges:
            y = layer.convolve(args[0])
            y = y + args[1] if len(args) > 1 else y
            return layer.activate(_round_map(y, self.ranges[layer.pre_name]))
        return super().call_module(target, args, kwargs)


def _round_map(x: Tensor, r: MapRange) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, r.scale, r.zero, 0, 255)


class GraphRun(Replacement):
    """Runs a function of tensors in the place of a module's forward."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *inputs: Tensor) -> Any:
        """Run it."""
        return self.run(*inputs)


@dataclass
class Judge:
    """Compares the outputs of a quantised network with those of the network in fp32."""

    model: nn.Module
    batches: Sequence[Tensor]
    targets: list[Any]

    def measure(self, forwards: Sequence[tuple[nn.Module, Replacement]]) -> Similarity:
        """The error of the network whose parts run by some forwards."""
        error = energy = 0.0
        same = total = 0
        classifies = True
        with torch.no_grad(), replaced_forwards(forwards):
            for images, target in zip(self.batches, self.targets, strict=True):
                output = self.model(images)
                for a, b in zip(
                    flatten_float_tensors(target), flatten_float_tensors(output), strict=True
                ):
                    a, b = centre(a), centre(b)
                    error += float((a - b).square().sum())
                    energy += float(a.square().sum())
                wanted = find_logits(target, len(images))
                logits = find_logits(output, len(images))
                if wanted is None or logits is None:
                    classifies = False
                    continue
                same += int((wanted.argmax(1) == logits.argmax(1)).sum())
                total += len(images)
        agreement = 100 * same / total if classifies and total else None
        return Similarity((error / max(energy, 1e-30)) ** 0.5, agreement)


@dataclass(frozen=True)
class Similarity:
    """The relative error of centred outputs, and the agreement of classes in percent."""

    error: float
    agreement: float | None


def make_judge(model: nn.Module, batches: Sequence[Tensor]) -> Judge:
    """A judge whose targets are the outputs of the model as it is."""
    with torch.no_grad():
        return Judge(model, batches, [model(images) for images in batches])


def centre(output: Tensor) -> Tensor:
    """Outputs (N, C) minus their mean per image, since classes do not depend on it; float64."""
    output = output.double()
    return output - output.mean(1, keepdim=True) if output.dim() == 2 else output


def rounding_forwards(
    parts: Sequence[ObservedPart], plans: Sequence[QuantizedPart], excluded: Excluded
) -> list[tuple[nn.Module, Replacement]]:
    """Forwards that round as a candidate does."""
    pairs = zip(parts, plans, strict=True)
    for part in parts:
        set_exact_(part.graph, frozenset(excluded))
    return [(part.graph.root, GraphRun(_Rounding(part, plan, excluded).run)) for part, plan in pairs]


def integer_forwards(
    parts: Sequence[ObservedPart], plans: Sequence[QuantizedPart], excluded: Excluded
) -> list[tuple[nn.Module, Replacement]]:
    """The emulations of a candidate."""
    return [
        (part.graph.root, GraphRun(lower_part(part.graph, plan, frozenset(excluded))[0]))
        for part, plan in zip(parts, plans, strict=True)
    ]


def try_candidate(
    judge: Judge, parts: Sequence[ObservedPart], method: str, excluded: Excluded
) -> tuple[list[QuantizedPart], Excluded, Similarity]:
    """Plan all parts by a method, and measure the result."""
    excluded = dict(excluded)
    plans = [plan_part(part, method, excluded) for part in parts]
    return plans, excluded, judge.measure(rounding_forwards(parts, plans, excluded))
