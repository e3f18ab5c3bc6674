"""Which route each deployed layer runs by: timed on this machine, or given."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from legocompress.deploy.choices import DENSE_ROUTES, POOL_ROUTES
from legocompress.deploy.graph import Graph
from legocompress.deploy.plain_site import PlainSite
from legocompress.deploy.site import LAYOUT, ConvSite
from legocompress.deploy.taped import taped
from legocompress.deploy.timing import fastest, interleaved, settling
from legocompress.state.deployment import Choices, ConvRoute, Format, SiteRoute

TOLERANCE = 1e-4
NOISE = 1.05  # of a layer timed alone
# PyTorch's threads wait actively for milliseconds after a job. On the cores of the kernels this
# costs a network more than a layer gains by them.
SETTLE, WORTH = 0.015, 1.3
Routes = dict[str, SiteRoute]


def in_layout(x: Tensor, layout: Format) -> Tensor:
    """A map in a memory format; other tensors as they are."""
    return x.contiguous(memory_format=LAYOUT[layout]) if x.dim() == 4 else x


@dataclass
class TunedGraph:
    """A memory format for a graph, a route for each of its layers, and what those took."""

    layout: Format
    routes: Routes
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)


def measured(
    graph: Graph,
    inputs: tuple[Tensor, ...],
    seconds: float,
    on_layer: Callable[[str], None] | None,
    only: tuple[ConvRoute, ...] | None = None,
    formats: tuple[Format, ...] = ("nchw", "channels_last"),
) -> TunedGraph:
    """Time the routes of each layer in both formats, then whole networks, and take the fastest."""
    device = inputs[0].device
    plans: dict[str, TunedGraph] = {}
    milliseconds: dict[str, dict[str, float]] = {}
    for layout in formats:
        tuner = _Tuner(graph, layout, on_layer, only)
        try:
            with torch.no_grad():
                tuner.run(*(in_layout(x, layout) for x in inputs))
        except RuntimeError:
            if layout == formats[0]:
                raise
            continue  # the network's own code asks for the other layout, such as in a view
        for name, times in tuner.times.items():
            medians = {f"{route}, {layout}": statistics.median(t) for route, t in times.items()}
            milliseconds.setdefault(name, {}).update({k: 1e3 * t for k, t in medians.items()})
        for name, plan in tuner.plans().items():
            if plan.routes not in [p.routes for p in plans.values() if p.layout == layout]:
                plans[f"{layout} {name}"] = plan

    def run(plan: TunedGraph) -> Callable[[], object]:
        use_(graph, plan)
        forward = taped(graph.runner).forward

        def whole() -> None:
            use_(graph, plan)
            forward(*(in_layout(x, plan.layout) for x in inputs))

        return whole

    with torch.no_grad():
        forms = {name: run(plan) for name, plan in plans.items()}
        rounds = 9 if len(forms) > 1 else 1
        limits = {"seconds": seconds / 2, "drop": 1.1, "settle": settling(device, SETTLE)}
        taken = interleaved(forms, device, rounds, warm=True, **limits)
    # Those that ran on to the end are compared; the others have lost.
    rounds = max(map(len, taken.values()))
    best = plans[fastest({n: times for n, times in taken.items() if len(times) == rounds})]
    use_(graph, best)
    best.milliseconds = milliseconds
    return best


class _Tuner(fx.Interpreter):
    """Runs a graph once, and at each deployed layer times all of its routes on the real input."""

    def __init__(
        self,
        graph: Graph,
        layout: Format,
        on_layer: Callable[[str], None] | None,
        only: tuple[ConvRoute, ...] | None,
    ) -> None:
        super().__init__(graph.runner)
        self.graph_, self.layout, self.on_layer, self.only = graph, layout, on_layer, only
        self.times: dict[str, dict[str, list[float]]] = {}
        self.settle = 0.0

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site = self.fetch_attr(target)
        if isinstance(site, ConvSite) and site.name not in self.times:
            self.settle = settling(args[0].device, SETTLE)
            self.times[site.name] = _site_times(site, self.only, self.layout, *args)
            best: Any = fastest(self.times[site.name])
            site.use(best, self.layout)
            keep = {best, self._best_of(site, dense=True), self._best_of(site, dense=False)}
            site.keep(keep, self.layout)
            if self.on_layer is not None:
                self.on_layer(site.name)
        elif isinstance(site, PlainSite) and site.name not in self.times:
            forms: dict[str, Callable[[], object]] = {
                route: lambda route=route: site.run(route, args[0])  # type: ignore[misc]
                for route in POOL_ROUTES
            }
            device, settle = args[0].device, settling(args[0].device, SETTLE)
            times = interleaved(forms, device, rounds=5, seconds=0.5, settle=settle)
            self.times[site.name] = times
            kernel, plain = (statistics.median(times[route]) for route in ("kernel", "plain"))
            site.route = "kernel" if kernel < plain * (WORTH if settle else 1) else "plain"
        return super().call_module(target, args, kwargs)

    def _best_of(self, site: ConvSite, dense: bool) -> Any:
        """The fastest dense route, or of a Lego layer the fastest that is none, unless it loses."""
        times = self.times[site.name]
        some = {r: t for r, t in times.items() if (r in DENSE_ROUTES) == dense} or times
        route = fastest(some)
        limit = WORTH if self.settle else NOISE if site.is_lego else 1.0
        least = min(map(statistics.median, times.values()))
        near = dense or statistics.median(times[route]) <= limit * least
        return route if near else fastest(times)

    def plans(self) -> dict[str, TunedGraph]:
        """The fastest route of each layer; and, since layers run by themselves find their weights
        in the cache and in a network do not, all dense and all Lego ones. One small pooling by
        PyTorch's threads can slow down the whole network: on several threads, all Lego is tried
        with none of them, too."""
        plains: Routes = {site.name: site.route for site in self.graph_.plains}
        sites = [site for site in self.graph_.convs if site.name in self.times]
        lego: Routes = {site.name: self._best_of(site, dense=False) for site in sites}
        every: dict[str, Routes] = {
            "fastest": {site.name: fastest(self.times[site.name]) for site in sites},  # type: ignore[misc]
            "dense": {site.name: self._best_of(site, dense=True) for site in sites},
            "lego": lego,
        }
        if self.settle:
            every["lego alone"] = {**lego, **dict.fromkeys(plains, "kernel")}
        return {
            name: TunedGraph(self.layout, {**plains, **chosen}) for name, chosen in every.items()
        }


def _site_times(
    site: ConvSite,
    only: tuple[ConvRoute, ...] | None,
    layout: Format,
    x: Tensor,
    residual: Tensor | None = None,
    spare: bool = False,
) -> dict[str, list[float]]:
    """Times of the layer's routes on one input, of those whose output is the dense one's.

    A spare residual is overwritten as in the network, but in a copy.
    """
    site.prepare("assemble", layout, x)
    expected = site.runner("assemble", layout)(x, residual, False)
    limit = TOLERANCE * float(expected.abs().max())
    own = residual.clone() if spare and residual is not None else residual
    forms: dict[str, Callable[[], object]] = {}
    possible = site.routes(x.device, x.dtype)
    if only is None and "fused" in possible:
        only = (*DENSE_ROUTES, "fused", "winograd")  # plain operators lose to the kernel
    wanted = [route for route in possible if only is None or route in only]
    for route in wanted or possible:
        try:
            site.prepare(route, layout, x)
            runner = site.runner(route, layout)
            gap = float((runner(x, residual, False) - expected).abs().max())
        except RuntimeError:
            continue  # the library refuses this layer
        if gap <= limit:
            forms[route] = lambda runner=runner: runner(x, own, spare)  # type: ignore[misc]
    if not forms:
        forms["assemble"] = lambda: site.runner("assemble", layout)(x, residual, False)
    rounds = 7 if len(forms) > 1 else 1
    return interleaved(
        forms, x.device, rounds, seconds=0.5, drop=1.3, settle=settling(x.device, SETTLE)
    )


def use_(graph: Graph, plan: TunedGraph) -> None:
    """Run the graph's layers by a plan's routes, which have been prepared."""
    for site in graph.convs:
        if site.name in plan.routes:
            site.use(plan.routes[site.name], plan.layout)  # type: ignore[arg-type]
    for plain in graph.plains:
        plain.route = plan.routes[plain.name]  # type: ignore[assignment]


def misfit(graphs: list[Graph], choices: Choices, x: Tensor) -> str | None:
    """Why choices cannot be those of a network that runs on inputs like x; None where they can."""
    for graph in graphs:
        if graph.name not in choices.formats:
            return f"they name no format for {graph.name or 'the network'!r}"
        kinds: dict[str, tuple[SiteRoute, ...]] = {
            site.name: site.routes(x.device, x.dtype) for site in graph.convs
        }
        kinds.update({site.name: POOL_ROUTES for site in graph.plains})
        for name, routes in kinds.items():
            chosen = choices.routes.get(name)
            if chosen not in routes:
                return f"for layer {name!r} they say {chosen!r}, possible: {', '.join(routes)}"
    return None


class _Packer(fx.Interpreter):
    """Runs a graph once and prepares at each deployed layer the route that was chosen for it."""

    def __init__(self, graph: Graph, plan: TunedGraph) -> None:
        super().__init__(graph.runner)
        self.plan = plan

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site = self.fetch_attr(target)
        if isinstance(site, ConvSite):
            route: Any = self.plan.routes[site.name]
            site.prepare(route, self.plan.layout, args[0])
            site.use(route, self.plan.layout)
        return super().call_module(target, args, kwargs)


def given(graph: Graph, inputs: tuple[Tensor, ...], choices: Choices) -> TunedGraph:
    """Prepare the routes of choices that fit the graph."""
    names = [str(site.name) for site in (*graph.convs, *graph.plains)]
    plan = TunedGraph(choices.formats[graph.name], {n: choices.routes[n] for n in names})
    for plain in graph.plains:
        plain.route = plan.routes[plain.name]  # type: ignore[assignment]
    with torch.no_grad():
        _Packer(graph, plan).run(*(in_layout(x, plan.layout) for x in inputs))
    return plan
