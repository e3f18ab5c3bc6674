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
from legocompress.quantize.ranges import METHODS, choose_range
from legocompress.state.quantization import ConvShifts, MapRange, QuantizedPart

UNFIT = "its sums or multipliers do not fit 16 bits"
Excluded = dict[str, str]  # name of a layer -> reason
OnStep = Callable[[str, int, int], None]
ENOUGH = 0.1  # error of the outputs, with which no layer is left in fp32
WORTH = 1.05  # a layer in fp32 must lower the error by this factor
MOST = 0.1  # of the convs may be left in fp32
FEW = 4  # images on which single layers are tried


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
                unfit += [] if builder.add_shift(maps[0], maps[1], y) is not None else [layer.name]
            elif isinstance(layer, GateLayer):
                y = ranges[assignment.names[node]]
                unfit += [] if builder.gate_shift(maps[0], maps[1], y) is not None else [layer.name]
        if not unfit:
            ours = {layer.name for _, layer in part.graph.layers()}
            return QuantizedPart(
                inputs=part.inputs,
                ranges=ranges,
                shifts=shifts,
                float_layers={name: why for name, why in excluded.items() if name in ours},
            )
        excluded.update(dict.fromkeys(unfit, UNFIT))


class _Rounding(fx.Interpreter):
    """Runs a graph in fp32 and rounds every map that would be uint8 to its 256 values.

    This is within a rounding of 16-bit sums of the emulation, and several times as fast.
    """

    def __init__(self, part: ObservedPart, plan: QuantizedPart) -> None:
        super().__init__(part.graph.graph_module)
        assignment = assign_roles(part.graph, plan.float_layers)
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

    def first(self, n_images: int) -> Judge:
        """A judge of the first images of the first batch."""
        return make_judge(self.model, [self.batches[0][:n_images]])


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
    parts: Sequence[ObservedPart], plans: Sequence[QuantizedPart]
) -> list[tuple[nn.Module, Replacement]]:
    """Forwards that round as a candidate does."""
    forwards: list[tuple[nn.Module, Replacement]] = []
    for part, plan in zip(parts, plans, strict=True):
        set_exact_(part.graph, plan.float_layers)
        forwards.append((part.graph.root, GraphRun(_Rounding(part, plan).run)))
    return forwards


def integer_forwards(
    parts: Sequence[ObservedPart], plans: Sequence[QuantizedPart]
) -> list[tuple[nn.Module, Replacement]]:
    """The emulations of a candidate."""
    return [
        (part.graph.root, GraphRun(lower_part(part.graph, plan)[0]))
        for part, plan in zip(parts, plans, strict=True)
    ]


@dataclass(frozen=True)
class Candidate:
    """One way to quantise a network, and how near its outputs come to those in fp32."""

    method: str
    plans: list[QuantizedPart]
    excluded: Excluded
    error: float


def try_candidate(
    judge: Judge, parts: Sequence[ObservedPart], method: str, excluded: Excluded
) -> Candidate:
    """Plan all parts by a method, and measure the result.

    Args:
        judge: what measures.
        parts: of the network.
        method: one of `ranges.METHODS`.
        excluded: layers that stay in fp32, with the reason.
    """
    excluded = dict(excluded)
    plans = [plan_part(part, method, excluded) for part in parts]
    error = judge.measure(rounding_forwards(parts, plans)).error
    return Candidate(method, plans, excluded, error)


def choose_method(judge: Judge, parts: Sequence[ObservedPart], report: OnStep) -> Candidate:
    """The candidate of the method with the least error; all layers are integer that can be."""
    candidates = []
    for number, method in enumerate(METHODS):
        candidates.append(try_candidate(judge, parts, method, {}))
        report("choosing ranges", number + 1, len(METHODS))
    return min(candidates, key=lambda candidate: candidate.error)


def exclude_layers(
    judge: Judge, parts: Sequence[ObservedPart], candidate: Candidate, report: OnStep
) -> Candidate:
    """Leave in fp32, one by one, the convs that lose most, until the error is small enough.

    First each conv alone is left in fp32, on few images, to learn what it loses. Then those that
    lose most are left out in turn, as long as each lowers the error by a factor of `WORTH`.

    Args:
        judge: what measures.
        parts: of the network.
        candidate: the network with all layers in integers.
        report: called after each trial.
    """
    names = [
        layer.name
        for part in parts
        for _, layer in part.graph.layers()
        if isinstance(layer, ConvLayer) and layer.folded is not None
    ]
    limit = max(1, round(MOST * len(names)))
    if candidate.error <= ENOUGH or len(names) < 2:
        return candidate
    few = judge.first(FEW)
    errors = {}
    for number, name in enumerate(names):
        trial = {**candidate.excluded, name: ""}
        errors[name] = try_candidate(few, parts, candidate.method, trial).error
        report("finding sensitive layers", number + 1, len(names))
    for name in sorted(names, key=errors.__getitem__)[:limit]:
        better = try_candidate(judge, parts, candidate.method, {**candidate.excluded, name: ""})
        if better.error * WORTH < candidate.error:
            gain = 100 * (1 - better.error / candidate.error)
            better.excluded[name] = f"in fp32 the error of the network is {gain:.0f} % smaller"
            candidate = try_candidate(judge, parts, candidate.method, better.excluded)
        if candidate.error <= ENOUGH:
            break
    return candidate
