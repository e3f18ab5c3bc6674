"""Time the forms of a network in interleaved runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from legocompress.lego.module import Route, lego_modules
from legocompress.lego.surgery import freeze_
from legocompress.models.inputs import Arguments
from legocompress.models.probe import evaluating
from legocompress.report.results import Latency


def time_routes(
    model: nn.Module, baseline: nn.Module | None, arguments: Arguments, repeats: int
) -> list[Latency]:
    """Time the routes of a converted network, and the baseline first if there is one.

    The routes and the assembled weights of the Lego layers are as before afterwards.
    """

    def run(route: Route) -> None:
        for _, module in lego_modules(model):
            module.route = route if route in module.routes() else "assemble"
        model(*arguments.args, **arguments.kwargs)

    forms: dict[str, Callable[[], object]] = {
        "assembled": lambda: run("assemble"),
        "reference": lambda: run("reference"),
    }
    if baseline is not None:
        forms = {"dense": lambda: baseline(*arguments.args, **arguments.kwargs), **forms}
    before = [(module, module.route, module.frozen_weight) for _, module in lego_modules(model)]
    try:
        with evaluating(model), evaluating(model if baseline is None else baseline):
            freeze_(model)
            return time_forms(forms, _example_batch(arguments), repeats)
    finally:
        for module, route, frozen_weight in before:
            module.route, module.frozen_weight = route, frozen_weight


def _example_batch(arguments: Arguments) -> Tensor:
    """Return the first batch (N, ...) among arguments; N images (c, H, W) in a list are one."""
    images = arguments.float_tensors()
    return images[0].expand(len(images), *images[0].shape) if images[0].dim() == 3 else images[0]


def time_forms(
    forms: dict[str, Callable[[], object]], example_input: Tensor, repeats: int
) -> list[Latency]:
    """Time forms of a network in interleaved runs, after one untimed round to warm up.

    `ratio` is the median over the rounds of (time of the first form / time of this form), so a
    form with a ratio above 1 is faster than the first.

    Args:
        forms: what runs each form, by its name.
        example_input: the input that all of them run on; its device, batch and dtype are reported.
        repeats: the timed rounds, at least one.
    """
    is_cuda = example_input.device.type == "cuda"
    times_ms: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if is_cuda:
                torch.cuda.synchronize()
            if turn:  # turn 0 warms up
                times_ms[name].append(1e3 * (time.perf_counter() - start))
    first = times_ms[next(iter(forms))]
    return [_summarize(name, times, first, example_input) for name, times in times_ms.items()]


def _summarize(
    form: str, times_ms: list[float], first_ms: list[float], example_input: Tensor
) -> Latency:
    """Reduce the times of one form to median, quartiles and ratio to the first form."""
    low, median, high = statistics.quantiles(times_ms, n=4) if len(times_ms) > 1 else times_ms * 3
    return Latency(
        form=form,
        median_ms=median,
        quartiles_ms=(low, high),
        ratio=statistics.median(a / b for a, b in zip(first_ms, times_ms, strict=True)),
        device=str(example_input.device),
        threads=torch.get_num_threads(),
        batch=example_input.shape[0],
        dtype=str(example_input.dtype).removeprefix("torch."),
        repeats=len(times_ms),
    )
