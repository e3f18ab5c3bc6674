"""Autotuning: timing the routes of each layer, then whole graphs, on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from legocompress.deploy.backends import DENSE_ROUTES, KERNEL_ROUTES
from legocompress.deploy.conv_layer import DeployedConv
from legocompress.deploy.fusing import FusedGraph
from legocompress.deploy.memory_format import to_memory_format
from legocompress.deploy.plain_layers import PLAIN_ROUTES, PlainLayer
from legocompress.deploy.recorded import record_runs
from legocompress.deploy.route_plan import RoutePlan, Routes, use_routes_
from legocompress.deploy.timing import cool_down_seconds, pick_fastest, time_interleaved
from legocompress.errors import KernelError
from legocompress.state.deployment import ConvRoute, Format

# Largest difference of a backend's output from 'assemble', relative to the largest output.
TOLERANCE = 1e-4
# A Lego layer, timed alone, counts as equally fast up to this ratio of medians.
TIMING_NOISE = 1.05
COOL_DOWN_SECONDS = 0.015
# PyTorch's threads keep spinning for milliseconds after a job, on the cores of the kernels'
# threads. So on several threads a layer leaves the kernels only where it is this much faster.
SPINNING_PENALTY = 1.3


def autotune(
    graph: FusedGraph,
    inputs: tuple[Tensor, ...],
    seconds: float,
    on_layer: Callable[[str], None] | None,
    only: tuple[ConvRoute, ...] | None = None,
    formats: tuple[Format, ...] = ("nchw", "channels_last"),
) -> RoutePlan:
    """Time the routes of each layer in each memory format, then whole graphs, and use the fastest.

    Args:
        graph: the graph, whose layers are then ready to run.
        inputs: to run it on.
        seconds: no further round of whole graphs starts once half of this has passed.
        on_layer: called with the name of each layer that has been timed, once per memory format.
        only: time these routes alone, in layers that have one of them.
        formats: memory formats to try.
    """
    plans: dict[str, RoutePlan] = {}
    milliseconds: dict[str, dict[str, float]] = {}
    for memory_format in formats:
        tuner = LayerTuner(graph, memory_format, on_layer, only)
        try:
            with torch.no_grad():
                tuner.run(*(to_memory_format(x, memory_format) for x in inputs))
        # The network's own code may refuse a format, for instance by a view, with any exception.
        except Exception:
            if memory_format == formats[0]:
                raise
            continue
        for name, medians in tuner.milliseconds().items():
            milliseconds.setdefault(name, {}).update(medians)
        for name, plan in tuner.plans().items():
            same_format = [p.routes for p in plans.values() if p.memory_format == memory_format]
            if plan.routes not in same_format:
                plans[f"{memory_format} {name}"] = plan
    fastest = _pick_fastest_plan(graph, plans, inputs, seconds)
    use_routes_(graph, fastest)
    fastest.milliseconds = milliseconds
    return fastest


class LayerTuner(fx.Interpreter):
    """Runs a graph once, and at each deployed layer times all of its routes on the real input."""

    def __init__(
        self,
        graph: FusedGraph,
        memory_format: Format,
        on_layer: Callable[[str], None] | None,
        only: tuple[ConvRoute, ...] | None,
    ) -> None:
        super().__init__(graph.graph_module)
        self.tuned_graph, self.memory_format = graph, memory_format
        self.on_layer, self.only = on_layer, only
        self.times: dict[str, dict[str, list[float]]] = {}  # seconds, by layer and route
        self.cool_down = 0.0

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Time the layer if it is a deployed one and new, then run it by its fastest route."""
        layer = self.fetch_attr(target)
        if isinstance(layer, DeployedConv) and layer.name not in self.times:
            self._tune_conv(layer, *args)
        elif isinstance(layer, PlainLayer) and layer.name not in self.times:
            self._tune_plain(layer, args[0])
        return super().call_module(target, args, kwargs)

    def _tune_conv(self, conv: DeployedConv, x: Tensor, *rest: Any) -> None:
        self.cool_down = cool_down_seconds(x.device, COOL_DOWN_SECONDS)
        self.times[conv.name] = time_routes(conv, self.only, self.memory_format, x, *rest)
        fastest: Any = pick_fastest(self.times[conv.name])
        conv.use(fastest, self.memory_format)
        candidates = {
            fastest,
            self._preferred(conv, dense=True),
            self._preferred(conv, dense=False),
        }
        conv.keep(candidates, self.memory_format)
        if self.on_layer is not None:
            self.on_layer(conv.name)

    def _tune_plain(self, layer: PlainLayer, x: Tensor) -> None:
        candidates: dict[str, Callable[[], object]] = {
            route: lambda route=route: layer.run(route, x)  # type: ignore[misc]
            for route in PLAIN_ROUTES
        }
        cool_down = cool_down_seconds(x.device, COOL_DOWN_SECONDS)
        times = time_interleaved(candidates, x.device, rounds=5, seconds=0.5, cool_down=cool_down)
        self.times[layer.name] = times
        kernel, plain = (statistics.median(times[route]) for route in ("kernel", "plain"))
        limit = plain * (SPINNING_PENALTY if cool_down else 1)
        layer.route = "kernel" if kernel < limit else "plain"

    def _preferred(self, conv: DeployedConv, dense: bool) -> Any:
        """The fastest dense route, or the fastest of the others unless it is clearly slower."""
        times = self.times[conv.name]
        some = {r: t for r, t in times.items() if (r in DENSE_ROUTES) == dense} or times
        route = pick_fastest(some)
        if dense:
            return route
        limit = SPINNING_PENALTY if self.cool_down else TIMING_NOISE if conv.is_lego else 1.0
        least = min(map(statistics.median, times.values()))
        return route if statistics.median(times[route]) <= limit * least else pick_fastest(times)

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """The median time of each layer by 'route, memory format'."""
        return {
            name: {
                f"{route}, {self.memory_format}": 1e3 * statistics.median(seconds)
                for route, seconds in times.items()
            }
            for name, times in self.times.items()
        }

    def plans(self) -> dict[str, RoutePlan]:
        """The plans to time as whole graphs.

        The fastest route of each layer; dense routes only; and Lego routes only, since a layer that
        is timed alone finds its weights in the cache, and in a network it does not. On several
        threads also Lego routes with every other layer on its kernel, since a single small pooling
        by PyTorch's threads can slow down the whole network.
        """
        plains: Routes = {plain.name: plain.route for plain in self.tuned_graph.plains}
        convs = [conv for conv in self.tuned_graph.convs if conv.name in self.times]
        lego: Routes = {conv.name: self._preferred(conv, dense=False) for conv in convs}
        routes: dict[str, Routes] = {
            "fastest": {conv.name: pick_fastest(self.times[conv.name]) for conv in convs},  # type: ignore[misc]
            "dense": {conv.name: self._preferred(conv, dense=True) for conv in convs},
            "lego": lego,
        }
        if self.cool_down:
            routes["lego alone"] = {**lego, **dict.fromkeys(plains, "kernel")}
        return {
            name: RoutePlan(self.memory_format, {**plains, **by_layer})
            for name, by_layer in routes.items()
        }


def time_routes(
    conv: DeployedConv,
    only: tuple[ConvRoute, ...] | None,
    memory_format: Format,
    x: Tensor,
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> dict[str, list[float]]:
    """Seconds of a conv's routes on one input, of those whose output agrees with 'assemble'.

    If the residual may be overwritten, it is so while timing, too, but in a copy.
    """
    conv.prepare("assemble", memory_format, x)
    expected = conv.runner("assemble", memory_format)(x, residual, False)
    limit = TOLERANCE * float(expected.abs().max())
    summand = residual.clone() if overwrite and residual is not None else residual
    candidates: dict[str, Callable[[], object]] = {}
    for route in _routes_to_time(conv.routes(x.device, x.dtype), only):
        try:
            conv.prepare(route, memory_format, x)
            runner = conv.runner(route, memory_format)
            gap = float((runner(x, residual, False) - expected).abs().max())
        except (RuntimeError, KernelError):
            continue  # the library refuses this layer
        if gap <= limit:
            candidates[route] = lambda runner=runner: runner(x, summand, overwrite)  # type: ignore[misc]
    if not candidates:
        assemble = conv.runner("assemble", memory_format)
        candidates["assemble"] = lambda: assemble(x, residual, False)
    rounds = 7 if len(candidates) > 1 else 1
    cool_down = cool_down_seconds(x.device, COOL_DOWN_SECONDS)
    return time_interleaved(
        candidates, x.device, rounds, seconds=0.5, drop=1.3, cool_down=cool_down
    )


def _routes_to_time(
    possible: tuple[ConvRoute, ...], only: tuple[ConvRoute, ...] | None
) -> tuple[ConvRoute, ...]:
    """The possible routes that are in `only`, or all of them if none is."""
    if only is None and any(route in KERNEL_ROUTES for route in possible):
        only = (*DENSE_ROUTES, *KERNEL_ROUTES)  # PyTorch's operators merge slower than a kernel
    return tuple(route for route in possible if only is None or route in only) or possible


def _pick_fastest_plan(
    graph: FusedGraph,
    plans: dict[str, RoutePlan],
    inputs: tuple[Tensor, ...],
    seconds: float,
) -> RoutePlan:
    """Time the whole graph by each plan and return the fastest."""

    def candidate(plan: RoutePlan) -> Callable[[], object]:
        use_routes_(graph, plan)
        forward = record_runs(graph.graph_module).forward  # the runs depend on the routes in use

        def run() -> None:
            use_routes_(graph, plan)
            forward(*(to_memory_format(x, plan.memory_format) for x in inputs))

        return run

    device = inputs[0].device
    with torch.no_grad():
        times = time_interleaved(
            {name: candidate(plan) for name, plan in plans.items()},
            device,
            rounds=9 if len(plans) > 1 else 1,
            seconds=seconds / 2,
            drop=1.1,
            warm=True,
            cool_down=cool_down_seconds(device, COOL_DOWN_SECONDS),
        )
    # A plan that was dropped for being slow has fewer rounds.
    n_rounds = max(map(len, times.values()))
    return plans[pick_fastest({name: t for name, t in times.items() if len(t) == n_rounds})]
