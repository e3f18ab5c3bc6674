"""Time the forms of a network in interleaved runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from legocompress.lego.module import Route, lego_modules
from legocompress.lego.surgery import freeze_
from legocompress.models.probe import evaluating
from legocompress.report.results import Latency


def time_routes(
    model: nn.Module, baseline: nn.Module | None, image: Tensor, repeats: int
) -> list[Latency]:
    """Time the routes of a converted network against its baseline, where there is one."""

    def run(route: Route) -> None:
        for _, module in lego_modules(model):
            module.route = route if route in module.routes() else "assemble"
        model(image)

    before = [(module, module.route, module.frozen_weight) for _, module in lego_modules(model)]
    try:
        return _timed(model, baseline, image, repeats, run)
    finally:
        for module, before_route, frozen in before:
            module.route, module.frozen_weight = before_route, frozen


def _timed(
    model: nn.Module,
    baseline: nn.Module | None,
    image: Tensor,
    repeats: int,
    run: Callable[[Route], None],
) -> list[Latency]:
    with evaluating(model), evaluating(model if baseline is None else baseline):
        freeze_(model)
        forms: dict[str, Callable[[], object]] = {
            "assembled": lambda: run("assemble"),
            "reference": lambda: run("reference"),
        }
        if baseline is not None:
            forms = {"dense": lambda: baseline(image), **forms}
        return latency(forms, image, repeats)


def latency(
    forms: dict[str, Callable[[], object]], example_input: Tensor, repeats: int
) -> list[Latency]:
    """Time forms of a network against the first of them, in interleaved runs after one warm-up.

    `ratio` is the median over rounds of first / form, so above 1 is faster than the first.
    """
    cuda = example_input.device.type == "cuda"
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - start))
    first = taken[next(iter(forms))]
    found = []
    for name, times in taken.items():
        low, middle, high = statistics.quantiles(times, n=4) if repeats > 1 else times * 3
        found.append(
            Latency(
                form=name,
                median_ms=middle,
                quartiles_ms=(low, high),
                ratio=statistics.median(a / b for a, b in zip(first, times, strict=True)),
                device=str(example_input.device),
                threads=torch.get_num_threads(),
                batch=example_input.shape[0],
                dtype=str(example_input.dtype).removeprefix("torch."),
                repeats=repeats,
            )
        )
    return found
