"""Count multiply-accumulates (MACs) with fvcore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from legocompress.lego.costs import dense_params, lego_macs
from legocompress.lego.module import lego_modules
from legocompress.models.probe import evaluating


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handles for fvcore's FlopCountAnalysis that count the merge: one MAC per gathered value.

    Pass them as `set_op_handle(**fvcore_handles())`. The transform is a plain conv, which fvcore
    counts by itself.
    """

    def count_gathered(inputs: list[Any], outputs: list[Any]) -> int:
        sizes = outputs[0].type().sizes()
        if sizes is None or len(sizes) != 4:  # it gathers Lego filters, not feature maps
            return 0
        return int(torch.Size(sizes).numel())

    return {"aten::index_select": count_gathered}


def count_macs_with_fvcore(model: nn.Module, *example_inputs: Tensor) -> int | None:
    """Count the MACs of all convs and Linears with fvcore, each Lego layer on its cheaper route.

    Returns None if the network cannot be traced, since fvcore counts on a trace.
    """
    with evaluating(model), use_cheapest_routes(model):
        analysis = FlopCountAnalysis(model, example_inputs)
        analysis.set_op_handle(**fvcore_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        try:
            counts = analysis.by_operator()
        # Tracing runs the network's own code, which may fail in any way; then there is no count.
        except Exception:
            return None
    return int(sum(counts[kind] for kind in ("conv", "linear", "addmm", "index_select")))


@contextmanager
def use_cheapest_routes(model: nn.Module) -> Iterator[None]:
    """Run each Lego layer on the route with the fewest MACs; restore the routes at the end.

    A layer on the route "assemble" is frozen, so that its weight is assembled only once.
    """
    before = [(module, module.route, module.frozen_weight) for _, module in lego_modules(model)]
    for module, _, _ in before:
        shape = module.lego_shape
        if "reference" in module.routes() and lego_macs(shape, 1) < dense_params(shape):
            module.route = "reference"
        else:
            module.route = "assemble"
            module.freeze()
    try:
        yield
    finally:
        for module, route, frozen_weight in before:
            module.route, module.frozen_weight = route, frozen_weight
