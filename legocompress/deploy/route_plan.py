"""A memory format for a graph and a route for each of its layers, and how to apply them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from legocompress.deploy.conv_layer import DeployedConv
from legocompress.deploy.fusing import FusedGraph
from legocompress.deploy.memory_format import to_memory_format
from legocompress.deploy.plain_layers import PLAIN_ROUTES
from legocompress.state.deployment import Choices, Format, Route

Routes = dict[str, Route]  # by name of the layer


@dataclass
class RoutePlan:
    """How a graph runs.

    `milliseconds` holds, for each layer, the median of each route in each memory format
    ('fused, nchw'); it is empty where nothing was timed.
    """

    memory_format: Format
    routes: Routes
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)


def use_routes_(graph: FusedGraph, plan: RoutePlan) -> None:
    """Run the graph's layers by a plan's routes, which must have been prepared."""
    for conv in graph.convs:
        if conv.name in plan.routes:
            conv.use(plan.routes[conv.name], plan.memory_format)  # type: ignore[arg-type]
    for plain in graph.plains:
        plain.route = plan.routes[plain.name]  # type: ignore[assignment]


def simplest_plan(graph: FusedGraph) -> RoutePlan:
    """Every layer by PyTorch's own operator, in NCHW."""
    routes: Routes = {conv.name: "assemble" for conv in graph.convs}
    return RoutePlan("nchw", {**routes, **{plain.name: "plain" for plain in graph.plains}})


def explain_misfit(graphs: list[FusedGraph], choices: Choices, x: Tensor) -> str | None:
    """Why choices cannot be used for these graphs on inputs like x; None where they can."""
    for graph in graphs:
        if graph.name not in choices.formats:
            return f"they name no format for {graph.name or 'the network'!r}"
        possible: dict[str, tuple[Route, ...]] = {
            conv.name: conv.routes(x.device, x.dtype) for conv in graph.convs
        }
        possible.update({plain.name: PLAIN_ROUTES for plain in graph.plains})
        for name, routes in possible.items():
            route = choices.routes.get(name)
            if route not in routes:
                return f"for layer {name!r} they say {route!r}, possible: {', '.join(routes)}"
    return None


def prepare_choices(graph: FusedGraph, inputs: tuple[Tensor, ...], choices: Choices) -> RoutePlan:
    """Prepare and use the routes of choices, which must fit the graph (`explain_misfit`)."""
    names = [str(layer.name) for layer in (*graph.convs, *graph.plains)]
    plan = RoutePlan(choices.formats[graph.name], {name: choices.routes[name] for name in names})
    prepare_plan(graph, inputs, plan)
    return plan


def prepare_plan(graph: FusedGraph, inputs: tuple[Tensor, ...], plan: RoutePlan) -> None:
    """Prepare and use the routes of a plan, which must name one for each layer of the graph."""
    for plain in graph.plains:
        plain.route = plan.routes[plain.name]  # type: ignore[assignment]
    with torch.no_grad():
        _Preparer(graph, plan).run(*(to_memory_format(x, plan.memory_format) for x in inputs))


class _Preparer(fx.Interpreter):
    """Runs a graph once and prepares, at each conv, the route of a plan on the real input."""

    def __init__(self, graph: FusedGraph, plan: RoutePlan) -> None:
        super().__init__(graph.graph_module)
        self.plan = plan

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, DeployedConv):
            route: Any = self.plan.routes[layer.name]
            layer.prepare(route, self.plan.memory_format, args[0])
            layer.use(route, self.plan.memory_format)
        return super().call_module(target, args, kwargs)
